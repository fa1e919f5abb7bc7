"""What an attention map says of its tokens, computed beside fused attention.

Guidance needs only the saliency, n numbers per image; the map itself is for pictures. Softmax runs
over chunks of queries in float32, so memory grows with n, not n^2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.tensors import Saliency

CHUNK_ELEMENTS = 1 << 20
"""The most attention probabilities that are held at once, 4 MiB in float32."""
LEAST_ROWS = 32
"""The fewest queries taken at once, so that a large batch does not mean many small operations."""


def _probabilities(
    query: Float[Tensor, "b k q e"],
    key: Float[Tensor, "b k n e"],
    scale: float | None,
    mask: Tensor | None,
) -> Float[Tensor, "b k q n"]:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Mixed precision would run the product in 16 bits, where values tie around the threshold.
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.float() * scale) @ key.float().transpose(-2, -1)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(dim=-1)


def _mask_rows(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]


def regrouped(
    query: Float[Tensor, "b k n e"],
    key: Float[Tensor, "b k n e"],
    value: Float[Tensor, "b k n e"],
    heads: int,
) -> tuple[Float[Tensor, "b heads n f"], Float[Tensor, "b heads n f"]]:
    """Return query and key of a layer that is read as if it had ``heads`` heads.

    For reproduction only: the commands published with SAG for 256 pixels read a model of 16 heads
    as one of 4, which mixes query, key and value (k e = heads f).

    Raises:
        ValueError: the channels do not divide into so many heads.
    """
    channels = query.shape[1] * query.shape[3]
    if channels % heads:
        raise ValueError(f"heads={heads}: the layer's {channels} channels do not divide into them")
    # (b, k, 3, e, n) -> (b, k 3 e, n): the channels of the convolution that made all three.
    together = torch.stack([query, key, value], dim=2).transpose(-1, -2).flatten(1, 3)
    mixed = together.unflatten(1, (heads, 3, channels // heads)).transpose(-1, -2)
    return mixed[:, :, 0], mixed[:, :, 1]


def saliency(
    query: Float[Tensor, "b k n e"],
    key: Float[Tensor, "b k n e"],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    tokens: slice | None = None,
) -> Saliency:
    """Return the attention each token receives: mean over heads, sum over queries, float32.

    saliency_j = mean_k sum_i softmax_j(q_ki . k_kj scale). Rows of the softmax sum to 1, so the
    saliency of a whole sequence has mean exactly 1. With ``tokens``, only queries and keys of that
    slice (the image's) count, and the result is renormalised to mean 1.

    Source: Hong et al. 2023, section 4.3 (there before thresholding).

    Example:
        >>> query = torch.ones(1, 2, 4, 8)
        >>> saliency(query, query)
        tensor([[1., 1., 1., 1.]])
    """
    # As many queries at a time as fit the bound.
    stop = query.shape[-2]
    first, last, _ = (tokens or slice(None)).indices(stop)
    rows = max(LEAST_ROWS, CHUNK_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[-2]))
    key = key.float()
    received = query.new_zeros((query.shape[0], key.shape[-2]), dtype=torch.float32)
    for start in range(first, last, rows):
        end = min(start + rows, last)
        probabilities = _probabilities(
            query[..., start:end, :], key, scale, _mask_rows(mask, start, end)
        )
        received += probabilities.sum(dim=-2).mean(dim=1)
    # Of a longer sequence keep the image's tokens, and make their mean 1 again.
    if tokens is None:
        return received
    received = received[:, first:last]
    return received / received.mean(dim=-1, keepdim=True)


def attention_map(
    query: Float[Tensor, "b k n e"],
    key: Float[Tensor, "b k n e"],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    tokens: slice | None = None,
) -> Float[Tensor, "b k n n"]:
    """Return softmax(q k^T scale) per head in float32; for pictures, since memory grows with n^2.

    With ``tokens``, the rows and columns of that slice, each row renormalised to sum 1.

    Example:
        >>> query = torch.ones(1, 2, 4, 8)
        >>> attention_map(query, query).shape
        torch.Size([1, 2, 4, 4])
    """
    probabilities = _probabilities(query, key, scale, mask)
    if tokens is None:
        return probabilities
    part = probabilities[..., tokens, tokens]
    return part / part.sum(dim=-1, keepdim=True)
