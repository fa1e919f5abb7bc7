"""Where SAG degrades: the attention mask of the paper, and the masks it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sag_dit.attention import AttentionLayer, capture_key
from sag_dit.tensors import Mask, Saliency, Scalar

MaskKind = Literal["attention", "global", "high_frequency", "random", "square"]
MASKS: tuple[str, ...] = get_args(MaskKind)

PURPOSE = 2


def attention_mask(saliency: Saliency, grid: tuple[int, int], threshold: Scalar) -> Mask:
    """Return where tokens receive more than ``threshold`` times the average attention, (b, h, w).

    The threshold may be of each image, (b, 1, 1).

    Source: equation 15 of the paper, threshold psi = 1.0.
    """
    mask: Tensor = saliency.unflatten(1, grid) > threshold
    return mask


def mean_saliency(
    attention: Mapping[str, Tensor], layers: Sequence[AttentionLayer], heads: int | None = None
) -> Float[Tensor, "b h w"]:
    """Return the saliency that was captured, averaged over layers on the finest of their grids."""
    finest = max((layer.grid for layer in layers), key=lambda grid: grid[0] * grid[1])
    maps = []
    for layer in layers:
        seen = attention[capture_key(layer.name, "saliency", heads)].unflatten(1, layer.grid)
        if layer.grid != finest:
            seen = F.interpolate(seen[:, None], finest, mode="nearest")[:, 0]
        maps.append(seen)
    return torch.stack(maps).mean(dim=0)


def of_same_area(scores: Float[Tensor, "b h w"], mask: Mask) -> Mask:
    """Return the highest scores of each image, as many as its mask has tokens."""
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    chosen: Tensor = ranks < mask.flatten(1).sum(dim=1, keepdim=True)
    return chosen.view_as(mask)


def detail(
    x_0: Float[Tensor, "b c h w"], blurred: Float[Tensor, "b c h w"], grid: tuple[int, int]
) -> Float[Tensor, "b gh gw"]:
    """Return the energy of what a blur takes away, averaged over the latent cells of each token."""
    energy = (x_0 - blurred).square().mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(energy, grid)[:, 0]


def centrality(mask: Mask) -> Float[Tensor, "b h w"]:
    """Return scores that fall with the distance to the middle; equal scores form squares."""
    rows, columns = (
        (torch.arange(size, device=mask.device) - (size - 1) / 2).abs() for size in mask.shape[1:]
    )
    return -torch.maximum(rows[:, None], columns[None]).expand(mask.shape)
