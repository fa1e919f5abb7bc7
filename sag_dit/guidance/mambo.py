"""Magnitude-aware guidance, MAMBO-G (Zhu et al. 2025, arXiv 2508.03442)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

from sag_dit.guidance.apg import inner
from sag_dit.guidance.cfg import put_out
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class MAMBO(Term):
    """CFG whose scale is damped where its update is long: pred = null + w' (cond - null).

    w' = 1 + (w - 1) exp(-``damping`` r), with r = |cond - null| / |null| of each image, as the
    network puts them out. Early in a run the two differ most, and a large scale overshoots there.
    w = 1 is off, and without damping it is CFG.

    Published: w = 10 with damping 8, diffusers' defaults.

    Source: the paper as diffusers writes it down, MagnitudeAwareGuidance.

    Raises:
        ValueError: ``damping`` is negative, or the model has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[MAMBO(4.0)])
    """

    key = "mambo"
    title = "MAMBO-G"
    does = "CFG, damped where it would move far"
    moves = "towards what was asked for, in short moves"
    look = "how well it shows what was asked for"
    source = "Zhu et al. 2025"
    example = MappingProxyType({"damping": 1.0})
    search = MappingProxyType({"scale": (0.1, 10.0), "damping": (0.0, 8.0)})

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    _: KW_ONLY
    damping: float = 8.0
    """How fast the scale falls with the update's length; 0 is CFG."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping < 0:
            raise ValueError(f"damping={self.damping}: expected 0 (CFG) or more")

    def contribution(self, ask: Question) -> Asking:
        """Return (w' - 1) (v_cond - v_null)."""
        cond, null = yield ask.base, ask.required_null()
        c, u = put_out(cond, ask.base.model), put_out(null, ask.base.model)
        squares = inner(c - u, c - u) / inner(u, u).clamp(min=1e-24)
        damped = (-self.damping * squares.sqrt()).exp()
        return (self.scale - 1) * damped * (cond.v - null.v)
