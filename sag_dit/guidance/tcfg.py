"""Tangential damping of CFG (Kwon et al., CVPR 2025, arXiv 2503.18137)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sag_dit.guidance.apg import inner
from sag_dit.guidance.cfg import put_out, read
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class TCFG(Term):
    """CFG from the part of the null prediction that it shares with the conditional one.

    pred = null' + w (cond - null'), with null' = <null, d> d, where d is the first right singular
    vector of the two predictions of an image, as the network puts them out: the direction that both
    have most in common. What is dropped, the second vector's part, is tangential to the paths along
    which images form. w = 1 is off.

    d is that of cos(a) cond + sin(a) null, with tan(2 a) = 2 <cond, null> / (|cond|^2 - |null|^2).

    It has no settings of its own; published for DiT-XL/2 and Stable Diffusion at CFG's scales.

    Source: algorithm 1 of the paper; diffusers' TangentialClassifierFreeGuidance is the same.

    Raises:
        ValueError: the scale is not finite, or the model has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[TCFG(1.5)])
    """

    key = "tcfg"
    title = "TCFG"
    does = "CFG without the null prediction's tangential part"
    moves = "towards what was asked for"
    look = "how well it shows what was asked for"
    source = "Kwon et al. 2025"

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v_cond - v_null')."""
        cond, null = yield ask.base, ask.required_null()
        c, u = put_out(cond, ask.base.model), put_out(null, ask.base.model)
        angle = torch.atan2(2 * inner(c, u), inner(c, c) - inner(u, u)) / 2
        common = angle.cos() * c + angle.sin() * u
        share = inner(u, common) / inner(common, common).clamp(min=1e-24)
        return (self.scale - 1) * (cond.v - read(share * common, null, ask.base.model).v)
