"""Rectified-CFG++ (Saini et al. 2025, arXiv 2510.07631): CFG for flows, half a step ahead."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch

from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class RectifiedCFGpp(Term):
    """The conditional velocity, and CFG's difference where it leads: v = v_cond + a(u) difference.

    difference = v_cond - v_null, both asked at the image that ``reach`` of a step along v_cond
    makes, and at its noise level. a(u) = lambda (1 - u)^``power``, where u = 1 is noise. lambda = 0
    is off, and counts as w - 1 of CFG. Each step costs two passes more than a plain one. Where a
    solver asks a second time, at the end of its step, nothing is left to go ahead.

    Published: Stable Diffusion 3.5 lambda = 4.5 with 28 steps. The authors' code differs from the
    paper: it goes a whole step ahead (``reach`` = 1) and adds noise of 0.005 there, which is left
    out here.

    Source: algorithm 1 of the paper, for one step.

    Raises:
        ValueError: ``reach`` is not in [0, 1], ``power`` is negative, or the model is no flow or
            has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[RectifiedCFGpp(1.5, power=0.5)])
    """

    key = "rcfgpp"
    title = "Rectified-CFG++"
    does = "CFG for flows, whose difference is asked half a step ahead"
    moves = "towards what was asked for, staying close to the plain path"
    look = "how well it shows what was asked for"
    source = "Saini et al. 2025"
    needs = frozenset({"flow"})
    instead = "use cfg_scale or cfgpp_scale"
    search = MappingProxyType({"power": (0.0, 1.0)})

    from_null = True

    _: KW_ONLY
    reach: float = 0.5
    """How far ahead it asks, as a share of the step, 0 to 1."""
    power: float = 0.0
    """How fast the guidance grows from noise to image; 0: it is the same throughout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reach <= 1:
            raise ValueError(f"reach={self.reach}: expected a share of the step, 0 to 1")
        if self.power < 0:
            raise ValueError(f"power={self.power}: expected 0 (constant) or more")

    def contribution(self, ask: Question) -> Asking:
        """Return a(u) (v_cond - v_null), of the image and level ahead."""
        (here,) = yield (ask.base,)
        # Go ahead along the conditional velocity.
        now, after = ask.step.level, ask.step.next
        t = float(now.t) + self.reach * (float(after.t) - float(now.t))
        ahead = ask.base.model.process.level(t)
        x = here.x_t + (float(ahead.sigma) - float(now.sigma)) * here.v
        # Ask there for what CFG is made of.
        cond, null = yield ask.base.at(x, ahead), ask.required_null().at(x, ahead)
        weight = self.scale * (1 - float(now.sigma)) ** self.power
        return torch.as_tensor(weight * (cond.v - null.v))
