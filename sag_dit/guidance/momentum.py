"""Momentum guidance (Liao et al. 2026, arXiv 2602.20360)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch

from sag_dit.guidance.history import as_v, begins, heading
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class MomentumGuidance(Term):
    """pred + a (pred - mean of the steps before), at no further pass; a = 0 is off.

    v_i + a (v_i - m_i), with m_0 = v_0 and m_{i+1} = (1 - b) v_i + b m_i, where v is guided by the
    other terms, a is ``scale`` and b is ``decay``. The mean also takes in the steps outside of the
    interval, and of a solver's step the first evaluation. The paper is of flows; of other processes
    the same is done to eps, which like a flow's v stays the same where a prediction is perfect.

    Published, as others cite it: b = 0.6; a = 0.5 with CFG at 2.5 to 3.5 for FLUX, 1 to 1.5 at
    smaller scales; interval (0.05, 0.7).

    Source: equations 11 and 12 of the paper's second version, without its two optional corrections
    of the mean, of its length and of its beginning.

    Raises:
        ValueError: ``decay`` is not in [0, 1).

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CFG(1.5), MomentumGuidance(0.5)])
    """

    key = "mg"
    title = "momentum guidance"
    does = "away from the mean of the guided steps before; no further pass"
    moves = "away from what it drew at the steps before"
    look = "outlines and details"
    source = "Liao et al. 2026"
    search = MappingProxyType({"scale": (0.1, 2.0), "decay": (0.0, 0.9)})

    on_guided = True
    remembers = True

    _: KW_ONLY
    decay: float = 0.6
    """Share of the mean that stays at each step, from 0 (the step before alone) to below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: expected 0 or more, and less than 1")

    def contribution(self, ask: Question) -> Asking:
        """Return a (v - m) and take v into the mean."""
        yield ()
        process = ask.base.model.process
        now = heading(ask.guided, process)
        mean = ask.memory.get("mean")
        if begins(ask):
            ask.memory["mean"] = now if mean is None else (1 - self.decay) * now + self.decay * mean
        if mean is None:
            return torch.zeros_like(now)
        return self.scale * as_v(now - mean, ask.guided, process)
