"""CFG++ (Chung et al. 2024, arXiv 2406.08070): CFG whose noise is the null prediction's."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from sag_dit.guidance.term import Asking, Contribution, Question, Term


@dataclass(frozen=True)
class CFGpp(Term):
    """CFG whose step adds back the null prediction's noise: x' = alpha' x_0 + sigma' eps_null.

    x_0 is that of null + lambda (cond - null), with lambda from 0 to 1. 0 is off, which is the
    plain prediction; a lambda close to 0 draws the null condition. The shorter the steps, the
    stronger the same lambda: for the ODE a step is one of CFG with w = lambda alpha' sigma /
    (alpha' sigma - alpha sigma'). What other methods contribute moves x_0 and the noise alike, so
    that their scales mean what they mean without CFG++.

    Published: Stable Diffusion and its XL lambda = 0.6, as w = 7.5 at 50 steps. For flows the
    paper's appendix adds sigma' v_null to x_0, which falls apart at such scales. The form here is
    the one its authors gave later, and is the same for every process.

    Source: algorithm 2 of the paper; for flows CFGpp-diffusion/CFGpp, issue 12.

    Raises:
        ValueError: lambda is not in [0, 1], the model has no null condition, or the sampler mixes
            several predictions in a step.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CFGpp(0.6)], sampler=DDIM(), steps=50)
    """

    key = "cfgpp"
    title = "CFG++"
    does = "x_0 of null + lambda (cond - null), and noise of null"
    moves = "towards what was asked for, by small scales"
    look = "how well it shows what was asked for"
    source = "Chung et al. 2024"
    search = MappingProxyType({"scale": (0.1, 1.0)})

    from_null = True
    renoises = True
    most: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.scale <= 1:
            raise ValueError(
                f"cfgpp_scale={self.scale}: expected lambda from 0 (off) to 1; 0.6 is about as "
                f"strong as cfg_scale=7.5 at 50 steps"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return (lambda - 1) (v_cond - v_null), of which x_0 alone moves by lambda times it."""
        cond, null = yield ask.base, ask.required_null()
        difference = cond.v - null.v
        return Contribution((self.scale - 1) * difference, x_0_only=self.scale * difference)
