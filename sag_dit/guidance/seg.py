"""Smoothed-energy guidance (Hong, NeurIPS 2024, arXiv 2408.00760)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.attention import AttentionEdit, AttentionLayer, Edit, Span
from sag_dit.attention.edits import Attend
from sag_dit.guidance.blur import gaussian_blur
from sag_dit.guidance.perturbed import Perturbed
from sag_dit.guidance.term import Question


@dataclass(frozen=True)
class BlurredQueries(AttentionEdit):
    """Blur the queries of the image over its grid, or replace them by their mean (sigma infinite).

    Blurring queries blurs the logits, since (G q) k = G (q k). The kernel is 6 sigma wide, at most
    the grid's shorter side, or one more where that is even.

    Example::

        worse = branch.edited(BlurredQueries("blocks.5.attn", grid=(16, 16), sigma=2.0))
    """

    grid: tuple[int, int]
    sigma: float
    tokens: Span | None = None

    def blurred(self, query: Float[Tensor, "r k n e"]) -> Float[Tensor, "r k n e"]:
        """Return the image's queries blurred."""
        if math.isinf(self.sigma):
            return query.mean(dim=2, keepdim=True).expand_as(query)
        side = min(self.grid)
        width = math.ceil(6 * self.sigma)
        kernel = min(width + 1 - width % 2, side + 1 - side % 2)
        images = query.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)
        smooth = gaussian_blur(images, kernel, self.sigma)
        rows: Tensor = smooth.flatten(2).transpose(1, 2)
        return rows.reshape(query.shape)

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attend with blurred queries; keys and values stay."""
        start, stop, _ = slice(*(self.tokens or (None, None))).indices(query.shape[2])
        image = self.blurred(query[:, :, start:stop])
        return attend(
            torch.cat([query[:, :, :start], image, query[:, :, stop:]], dim=2), key, value
        )


@dataclass(frozen=True)
class SEG(Perturbed):
    """pred + s (pred - pred with blurred queries in ``layers``); s = 0 is off.

    ``blur_sigma`` is in tokens; ``.inf`` at the command line, ``math.inf`` in Python, makes every
    query their mean.

    Published: SDXL s = 3, all self-attention of the middle block, sigma infinite; the paper holds
    s and turns sigma (1, 2, 5, 10, infinite).

    Source: section 3.3 and equation 9 of the paper, in the authors' code's counting (0 is off).

    Raises:
        ValueError: ``blur_sigma`` is not above 0, or the model lacks a layer or null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SEG(3.0, blur_sigma=10.0)])
    """

    key = "seg"
    former = ("sag_dit.guidance.seg.SEG",)
    title = "SEG"
    does = "away from blurred attention"
    moves = "away from one whose parts look everywhere alike"
    look = "how its parts fit together"
    source = "Hong 2024"
    search = MappingProxyType({"blur_sigma": [1.0, 2.0, 5.0, 10.0, math.inf]})

    unbounded: ClassVar[tuple[str, ...]] = ("blur_sigma",)

    _: KW_ONLY
    blur_sigma: float = math.inf
    """In tokens; .inf: every query is the mean of all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blur_sigma <= 0:
            raise ValueError(f"blur_sigma={self.blur_sigma}: expected more than 0, in tokens")

    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Blur the queries of every layer."""
        return tuple(
            BlurredQueries(layer.name, layer.grid, self.blur_sigma, layer.span) for layer in layers
        )
