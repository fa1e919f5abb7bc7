"""PLADIS: attention extrapolated towards a sparse one (Kim & Sim, ICCV 2025, arXiv 2503.07677)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.attention import AttentionEdit
from sag_dit.attention.edits import Attend
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.term import Branch, Question, Rewriting


def entmax(logits: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Return the 1.5-entmax of logits z over the last dimension: clamp(z / 2 - tau, 0)^2.

    tau is such that it sums to 1. Of the k largest halves with mean m and variance s, tau is
    m - sqrt(1 / k - s); k is the largest number whose smallest value is above its tau.

    Source: algorithm 2 of Peters, Niculae & Martins 2019 (arXiv 1905.05702).

    Example:
        >>> entmax(torch.tensor([2.0, 2.0, -9.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    z = (logits - logits.amax(dim=-1, keepdim=True)) / 2
    largest = z.sort(dim=-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = largest.cumsum(dim=-1) / k
    variance = largest.square().cumsum(dim=-1) / k - mean.square()
    taus = mean - (1 / k - variance).clamp(min=0).sqrt()
    count = (taus <= largest).sum(dim=-1, keepdim=True)
    return (z - taus.gather(-1, count - 1)).clamp(min=0).square()


@dataclass(frozen=True)
class Sparser(AttentionEdit):
    """The attention map A becomes A + s (its 1.5-entmax - A).

    Example::

        sharp = branch.edited(Sparser("transformer_blocks.0.attn2", scale=2.0))
    """

    scale: float

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Return the extrapolated map times the values."""
        # The map is what attention makes of unit vectors; its logarithm is the logits, but for a
        # number of each row, which entmax does not see. So scale and masks are the call's own.
        unit = torch.eye(key.shape[2], device=value.device, dtype=value.dtype)
        maps = attend(query, key, unit.expand(*key.shape[:2], -1, -1)).float()
        sparse = entmax(maps.clamp(min=1e-12).log())
        change = (self.scale * (sparse - maps)).to(value.dtype) @ value
        return attend(query, key, value) + change


@dataclass(frozen=True)
class PLADIS(Rewriting):
    """Attention to the text extrapolated from soft to sparse, A + s (A_sparse - A); s = 0 is off.

    A_sparse is the 1.5-entmax of the same logits. It acts in every layer of cross-attention and
    every row, and needs no further pass.

    Published: s = 2, for models of many steps and of few.

    Source: the paper, and pamparamm/sd-perturbed-attention, pladis_utils.py.

    Raises:
        ValueError: the model has no cross-attention to a text.

    Example::

        with sag_dit.guide(pipe, PLADIS(2.0)):
            image = pipe("a corgi").images[0]
    """

    key = "pladis"
    title = "PLADIS"
    does = "attention to the text made sparser"
    moves = "towards words that it looks at, without those that it hardly looks at"
    look = "how well it shows what was asked for"
    source = "Kim & Sim 2025"
    needs = frozenset({"cross"})

    def check(self, model: Denoiser) -> None:
        """Refuse a model without cross-attention to a text."""
        super().check(model)
        if not isinstance(model, TextConditional) or not model.cross_layers:
            raise ValueError(
                f"pladis_scale={self.scale}: guides cross-attention to a text, and "
                f"{type(model.network).__name__} has none; set pladis_scale=0"
            )

    def rewritten(self, ask: Question) -> Question:
        """Return the question with the attention of both branches edited."""
        model: Any = ask.base.model
        scale = self.scale * self.weight(ask.step)
        edits = [Sparser(name, scale) for name in model.cross_layers]

        # Before other edits of attention, which then see the sparser one.
        def sparser(branch: Branch) -> Branch:
            return replace(branch, edits=(*edits, *branch.edits))

        null = None if ask.null is None else sparser(ask.null)
        return replace(ask, base=sparser(ask.base), null=null)
