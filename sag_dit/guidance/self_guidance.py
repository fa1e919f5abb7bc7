"""Self-guidance (Li et al. 2024, arXiv 2412.05827)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType

import torch

from sag_dit.denoiser import Denoiser
from sag_dit.guidance.history import as_v, begins, heading
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class SelfGuidance(Term):
    """pred(x_t, t) + w (pred(x_t, t) - pred(x_t, t + d)), where w = 0 is off.

    The second prediction is of the same image, told that it is noisier. d is ``shift`` of all of
    the time, and no time is later than the noisiest. The difference is one of eps, and of v for
    flows, and of the prediction with the given condition, also beside CFG.

    Published: Stable Diffusion 3 w = 3, shift 0.01, with CFG at 7.5; FLUX w = 1.

    Source: the authors' code, Self-Guidance at 843bda7, of kind "sg".

    Raises:
        ValueError: ``shift`` is not in (0, 1), or the network puts out scores, whose size is
            another at another time.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SelfGuidance(1.0)])
    """

    key = "sg"
    title = "self-guidance"
    does = "away from what the model says when told a noisier time"
    moves = "away from what the model draws at a noisier time"
    look = "outlines and details"
    source = "Li et al. 2024"
    example = MappingProxyType({"shift": 0.1})
    search = MappingProxyType({"shift": (0.005, 0.05)})

    _: KW_ONLY
    shift: float = 0.01
    """How much noisier the told time is, as a share of all of the time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shift < 1:
            raise ValueError(f"shift={self.shift}: expected a number between 0 and 1")

    def check(self, model: Denoiser) -> None:
        """Refuse a network of scores."""
        super().check(model)
        if model.kind == "score":
            raise ValueError(
                f"sg_scale={self.scale}: this network puts out scores, whose size is another at "
                f"another time; use sgprev_scale, or set sg_scale=0"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return w (v - v_noisier)."""
        process, t = ask.base.model.process, float(ask.step.level.t)
        noisiest = process.grid(1)[0]
        whole = float(noisiest.t) / process.elapsed(noisiest)
        noisier = min(t + self.shift * whole, float(noisiest.t))
        if noisier <= t:
            return torch.zeros_like(ask.base.x_t)
        told = replace(ask.step.level, t=noisier)
        base, worse = yield ask.base, ask.base.at(ask.base.x_t, told)
        return self.scale * as_v(heading(base, process) - heading(worse, process), base, process)


@dataclass(frozen=True)
class SelfGuidancePrevious(Term):
    """pred + w (pred - pred of the step before), at no further pass; w = 0 is off.

    The difference is one of eps, and of v for flows, and of the prediction with the given
    condition, also beside CFG. The first step of a run has none before it. Of a solver's step the
    first evaluation is what the next one takes as the step before.

    Published: Stable Diffusion 3 and FLUX w = 3, interval (null, 500) in t.

    Source: the authors' code, Self-Guidance at 843bda7, of kind "sg_prev".

    Example::

        late = SelfGuidancePrevious(3.0, interval=(None, 500), interval_in="t")
        sag_dit.sample(model, [3, 7], guidance=[late])
    """

    key = "sgprev"
    title = "self-guidance, SG-prev"
    does = "away from the prediction of the step before; no further pass"
    moves = "away from what it drew at the step before"
    look = "outlines and details"
    source = "Li et al. 2024"

    remembers = True

    def contribution(self, ask: Question) -> Asking:
        """Return w (v - v_before) and remember v."""
        (base,) = yield (ask.base,)
        process = ask.base.model.process
        now, before = heading(base, process), ask.memory.get("before")
        if begins(ask):
            ask.memory["before"] = now
        if before is None:
            return torch.zeros_like(now)
        return self.scale * as_v(now - before, base, process)
