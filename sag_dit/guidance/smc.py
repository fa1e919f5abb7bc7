"""Sliding-mode control of CFG, SMC-CFG (Wang et al. 2026, arXiv 2603.03281)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

from sag_dit.guidance.cfg import put_out, read
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class SMC(Term):
    """CFG whose update is pushed towards a decaying one: pred = null + w e', e = cond - null.

    e' = e - ``gain`` sign(s), where s = (e - e'_before) + ``surface`` e'_before is 0 for an update
    that decays as it should, and e'_before is that of the evaluation before, in the first one e
    itself. All of this is of the network's own output. w = 1 is off, and without gain it is CFG.

    Published: gain 0.2 and surface 5, with w = 7.5 (Stable Diffusion 3.5), 2 to 3 (FLUX), 4 (Qwen).

    Source: hanyang-21/CFG-Ctrl, ``pipeline/common_cfg_ctrl.py``.

    Raises:
        ValueError: ``gain`` or ``surface`` is negative, or the model has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SMC(4.0, gain=0.1)])
    """

    key = "smc"
    title = "SMC-CFG"
    does = "CFG, steered so that its update decays"
    moves = "towards what was asked for, steadily"
    look = "how well it shows what was asked for"
    source = "Wang et al. 2026"
    search = MappingProxyType({"gain": (0.01, 0.8), "surface": (0.05, 8.0)})

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    _: KW_ONLY
    gain: float = 0.2
    """How hard the update is pushed, in units of the network's output; 0 is CFG."""
    surface: float = 5.0
    """How fast the update should decay: lambda of the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gain", "surface"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")

    def contribution(self, ask: Question) -> Asking:
        """Return what null + w e' adds to the conditional prediction."""
        cond, null = yield ask.base, ask.required_null()
        c, u = put_out(cond, ask.base.model), put_out(null, ask.base.model)
        update = c - u
        before = ask.memory.get("update", update)
        off_course = (update - before) + self.surface * before
        ask.memory["update"] = update = update - self.gain * off_course.sign()
        return read(u + self.scale * update, cond, ask.base.model).v - cond.v
