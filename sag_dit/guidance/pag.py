"""Perturbed-attention guidance (Ahn et al., ECCV 2024, arXiv 2403.17377)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sag_dit.attention import AttentionEdit, AttentionLayer, Edit, Span
from sag_dit.attention.edits import Attend
from sag_dit.guidance.perturbed import Perturbed
from sag_dit.guidance.term import Question


@dataclass(frozen=True)
class IdentityAttention(AttentionEdit):
    """The image's tokens look at themselves only, and at what else is in the sequence (text).

    Example::

        worse = branch.edited(IdentityAttention("blocks.5.attn"))
    """

    tokens: Span | None = None

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Return the values themselves, or attend with an identity as the block of the image."""
        if self.tokens is None:
            return value
        n = query.shape[-2]
        image = torch.zeros(n, dtype=torch.bool, device=query.device)
        image[slice(*self.tokens)] = True
        diagonal = torch.eye(n, dtype=torch.bool, device=query.device)
        return attend(query, key, value, ~(image[:, None] & image) | diagonal)


@dataclass(frozen=True)
class PAG(Perturbed):
    """pred + s (pred - pred with identity self-attention in ``layers``); s = 0 is off.

    Published: Stable Diffusion s = 3 in the middle block, with CFG at w = 4 or without; Stable
    Diffusion 3 (diffusers' example) s = 0.7 in block 13 with w = 5. ADM's commands count g = s + 1
    from 1.

    Source: equations 16 and 17 of the paper.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[PAG(3.0, layers=[5, 6])])
    """

    key = "pag"
    former = ("sag_dit.guidance.pag.PAG",)
    title = "PAG"
    does = "away from attention to oneself alone"
    source = "Ahn et al. 2024"

    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Make the attention of every layer the identity."""
        return tuple(IdentityAttention(layer.name, layer.span) for layer in layers)
