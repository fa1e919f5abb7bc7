"""How the states of metrics are joined over ranks, also those of ranks without any data.

torchmetrics gathers a state from every rank before it reduces it, and expects equal shapes or at
least equal dimensions; a rank that saw no image knows neither. Both functions are given to a metric
as its ``dist_sync_fn`` and return a list of one tensor, on which torchmetrics' own reduction is the
identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.float32, torch.float64, torch.int64)


def summed(state: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the sum of a state over ranks; a smaller state counts as padded with zeros."""
    shape = torch.tensor(state.shape, device=state.device)
    dist.all_reduce(shape, dist.ReduceOp.MAX, group=group)
    total = padded(state, shape.tolist()).clone()
    dist.all_reduce(total, group=group)
    return [total]


def gathered(state: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the rows of all ranks, one rank after the other; a rank may have none.

    An empty state's type and width are unknown and taken from the other ranks.
    """
    ranks = dist.get_world_size(group)
    rows, width, kind = 0, 0, 0
    if state.numel():
        rows, width = len(state), state.shape[1] if state.ndim > 1 else 0
        kind = DTYPES.index(state.dtype)
    header = torch.tensor([rows, width, kind], device=state.device)
    headers = [torch.zeros_like(header) for _ in range(ranks)]
    dist.all_gather(headers, header, group=group)
    counts, widths, kinds = torch.stack(headers).T.tolist()
    if not max(counts):
        return [state]
    shape = [max(counts), max(widths)] if max(widths) else [max(counts)]
    own = state.new_zeros(shape, dtype=DTYPES[max(kinds)])
    if rows:
        own[:rows] = state
    every = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(every, own, group=group)
    return [torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])]


def padded(state: Tensor, shape: list[int]) -> Tensor:
    """Return a state of a larger shape, the new entries zero; itself if there are none."""
    if list(state.shape) == shape:
        return state
    missing = [size - had for size, had in zip(shape, state.shape, strict=True)]
    return functional.pad(state, [n for each in reversed(missing) for n in (0, each)])


def joined(rows: list[Tensor] | Tensor) -> Tensor:
    """Return the rows of a list state, which torchmetrics makes a tensor once it is synced."""
    if isinstance(rows, Tensor):
        return rows
    return torch.cat(rows) if rows else torch.zeros(0)
