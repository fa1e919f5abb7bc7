"""Adaptive projected guidance (Sadat et al., ICLR 2025, arXiv 2410.02416)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.tensors import Images


def inner(a: Images, b: Images) -> Images:
    """Return the inner product of each pair of images, (b, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class APG(Term):
    """CFG without the part of its update that is parallel to the prediction and oversaturates.

    The update is D = x_0_cond - x_0_null + beta D_before, with ``momentum`` beta. Where D is longer
    than ``norm_threshold`` r it is shortened to r; r = 0 shortens nothing. D is split into a part
    parallel to x_0_cond and one orthogonal to it, and x_0 = x_0_cond + (w - 1) (D_orthogonal +
    ``eta`` D_parallel). w = 1 is off. With eta = 1, r = 0 and beta = 0 it is CFG. D_before is that
    of the last step in which the term acted, before it was shortened.

    Published: eta = 0; beta from -0.75 to -0.5; r belongs to the size of the latent, 2.5 to 15.

    Source: algorithm 1 of the paper.

    Raises:
        ValueError: r is negative, beta is not in (-1, 1), or the model has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[APG(2.0, norm_threshold=10.0)])
    """

    key = "apg"
    former = ("sag_dit.guidance.apg.APG",)
    title = "APG"
    does = "CFG without what oversaturates"
    moves = "towards what was asked for, without oversaturating it"
    look = "how well it shows what was asked for"
    source = "Sadat et al. 2025"
    example = MappingProxyType({"norm_threshold": 25.0})
    search = MappingProxyType({"eta": (0.0, 1.0), "norm_threshold": [0.0, 2.5, 5.0, 10.0, 15.0]})

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    _: KW_ONLY
    eta: float = 0.0
    """Share of the update that is parallel to the prediction; 1 keeps all of it."""
    norm_threshold: float = 0.0
    """The longest update, by the size of the latent 2.5 to 15; 0 is off."""
    momentum: float = -0.5
    """Share of the update before that is added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_threshold < 0:
            raise ValueError(f"norm_threshold={self.norm_threshold}: expected 0 (off) or more")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: expected a number between -1 and 1")

    def contribution(self, ask: Question) -> Asking:
        """Return the update of x_0 as one of v: -1 / sigma of it."""
        cond, null = yield ask.base, ask.required_null()
        # The update of CFG in x_0, with momentum: a share of the step before is added.
        update = cond.x_0 - null.x_0 + self.momentum * ask.memory.get("update", 0.0)
        ask.memory["update"] = update
        # Shorten it to the threshold.
        if self.norm_threshold:
            length = inner(update, update).sqrt()
            update = update * (self.norm_threshold / length).clamp(max=1)
        # Keep a share eta of the part that is parallel to the prediction, which oversaturates.
        direction = cond.x_0 / inner(cond.x_0, cond.x_0).sqrt().clamp(min=1e-12)
        parallel = inner(update, direction) * direction
        update = update - parallel + self.eta * parallel
        return torch.as_tensor(-(self.scale - 1) / cond.level.sigma * update)
