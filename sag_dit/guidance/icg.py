"""Independent condition guidance (Sadat et al., ICLR 2025, arXiv 2407.02687)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.guidance.term import Asking, Question, Term

PURPOSE = 4


@dataclass(frozen=True)
class ICG(Term):
    """CFG whose null condition is a random class: pred = random + w (cond - random); w = 1 is off.

    It also guides models that were trained without label dropout. Every image draws a class of its
    own at every step, from its own randomness. Sometimes, once in num_classes draws, that is the
    class asked for.

    Published: DiT-XL/2 w = 1.4 where CFG has 1.5; EDM2 1.25.

    Source: section 4 of the paper.

    Raises:
        ValueError: the model is not one of several classes.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[ICG(1.4)])
    """

    key = "icg"
    former = ("sag_dit.guidance.icg.ICG",)
    title = "ICG"
    does = "away from a random class"
    moves = "away from a class drawn at random"
    look = "how well it shows what was asked for"
    source = "Sadat et al. 2024"
    needs = frozenset({"classes"})

    neutral: ClassVar[float] = 1.0

    def check(self, model: Denoiser) -> None:
        """Refuse a model that is not asked with labels, or knows one only."""
        super().check(model)
        if not isinstance(model, ClassConditional) or model.num_classes < 2:
            raise ValueError(
                f"icg_scale={self.scale}: needs a model of two or more classes; set icg_scale=1"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v_cond - v_random)."""
        model = ask.base.model
        assert isinstance(model, ClassConditional)
        uniform = torch.special.ndtr(ask.draw((1,), PURPOSE)[:, 0])
        classes = (uniform * model.num_classes).long().clamp(max=model.num_classes - 1)
        cond, other = yield ask.base, replace(ask.base, cond=classes, edits=(), captures=())
        return (self.scale - 1) * (cond.v - other.v)
