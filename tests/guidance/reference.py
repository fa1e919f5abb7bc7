"""Guidance written straight from the papers: noise predictions, loops, no branches, no tap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import Flow, NoiseLevel, Process, Step


def step_at(process: Process, index: int, count: int = 10) -> Step:
    """One step of a run; step 0 is the noisiest."""
    grid = process.grid(count)
    return Step(index, count, grid[index], grid[index + 1])


@dataclass
class Straight:
    """A network asked one image batch at a time, whose output is read as noise."""

    network: DiT
    process: Process
    kind: str = "eps"
    x_0_range: tuple[float, float] | None = None

    def eps(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """The predicted noise; a flow network says v = eps - x_0."""
        out = self.network(x, torch.full((x.shape[0],), t), y)[:, : x.shape[1]]
        if self.kind == "eps":
            return out
        assert isinstance(self.process, Flow)
        return x + (1 - t) * out

    def saliency(self, x: Tensor, t: float, y: Tensor, block: int) -> Tensor:
        """Column sums of the mean attention map over heads, shape (b, h, w) of the grid."""
        seen: list[Tensor] = []
        attn = self.network.blocks[block].attn
        handle = attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.eps(x, t, y)
        handle.remove()
        b, n, d = seen[0].shape
        heads = attn.num_heads
        query, key, _ = attn.qkv(seen[0]).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        probabilities = (query @ key.mT / math.sqrt(d // heads)).softmax(dim=-1)
        return probabilities.mean(dim=1).sum(dim=1).reshape(b, *self.network.grid)

    def x_0(self, x: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """The clean image that explains x by this noise."""
        x_0 = (x - level.sigma * eps) / level.alpha
        return x_0 if self.x_0_range is None else x_0.clamp(*self.x_0_range)

    def sag_difference(
        self,
        x: Tensor,
        level: NoiseLevel,
        y: Tensor,
        *,
        block: int | None,
        threshold: float = 1.0,
        blur_sigma: float = 1.0,
        kernel_size: int = 9,
    ) -> Tensor:
        """eps(x_t) - eps(x_bar) of SAG; without a block the mask is 1 (blur guidance)."""
        t = float(level.t)
        eps = self.eps(x, t, y)
        x_0 = self.x_0(x, eps, level)
        mask = torch.ones_like(x[:, :1])
        if block is not None:
            on_grid = (self.saliency(x, t, y, block) > threshold).to(x)
            size = self.network.patch_size
            mask = on_grid.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
        x_0_tilde = mask * blur(x_0, kernel_size, blur_sigma) + (1 - mask) * x_0
        x_bar = level.alpha * x_0_tilde + level.sigma * eps
        return eps - self.eps(x_bar, t, y)


def blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """A Gaussian blur pixel by pixel, reflecting at the borders (the edge is not repeated)."""
    half = kernel_size // 2
    weights = torch.tensor([math.exp(-0.5 * (i / sigma) ** 2) for i in range(-half, half + 1)])
    weights = weights / weights.sum()

    def reflected(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for axis in (2, 3):
        size = x.shape[axis]
        lines = []
        for i in range(size):
            sources = [reflected(i + k, size) for k in range(-half, half + 1)]
            picked = x.index_select(axis, torch.tensor(sources))
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            lines.append((picked * weights.reshape(shape)).sum(dim=axis))
        x = torch.stack(lines, dim=axis)
    return x


@contextmanager
def counted(*models: ClassConditional) -> Iterator[list[int]]:
    """The rows of every forward pass of these models' networks."""
    rows: list[int] = []
    handles = [
        model.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for model in models
    ]
    yield rows
    for handle in handles:
        handle.remove()
