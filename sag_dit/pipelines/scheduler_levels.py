"""Where a pipeline's scheduler stands: the noise level of each call of the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sag_dit.process import DDPM, Flow, NoiseLevel, Process
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import CLEAN
from sag_dit.sampler.diffusers import levels_of

BY_TIME = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
)
"""Schedulers whose level is alphas_cumprod at their time."""

BY_INDEX = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose level is their sigma at the current step; most can also run a flow."""

FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)

KINDS: dict[str, OutputKind] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x_0",
    "flow_prediction": "v",
}


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler unless its noise levels are known to be read correctly.

    Raises:
        ValueError: the message lists the schedulers that are known.
    """
    known = (*BY_TIME, *BY_INDEX, *FLOWS)
    if not _is_one_of(scheduler, known):
        raise ValueError(
            f"scheduler {type(scheduler).__name__}: its noise levels are not known to be read "
            f"right; expected one of {', '.join(known)}"
        )


def _is_one_of(scheduler: Any, names: tuple[str, ...]) -> bool:
    return any(each.__name__ in names for each in type(scheduler).__mro__)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return _is_one_of(scheduler, FLOWS) or (
        bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    )


def process_of(scheduler: Any) -> Process:
    """Return the kind of process; the levels themselves are the scheduler's."""
    return Flow(time_scale=1000) if _is_flow(scheduler) else DDPM()


def kind_of(scheduler: Any) -> OutputKind:
    """Return what the network puts out; a flow's is always the velocity."""
    return "v" if _is_flow(scheduler) else KINDS[scheduler.config.prediction_type]


def levels(scheduler: Any) -> tuple[NoiseLevel, ...]:
    """Return the level of every evaluation, and the clean one; t is the scheduler's own time."""
    times = scheduler.timesteps.cpu().double().tolist()
    # A flow keeps sigma itself.
    if _is_flow(scheduler):
        sigmas = [*scheduler.sigmas.cpu().double().tolist()[: len(times)], 0.0]
        return tuple(
            NoiseLevel(t=t, alpha=1 - sigma, sigma=sigma, d_alpha=-1.0, d_sigma=1.0)
            for t, sigma in zip([*times, 0.0], sigmas, strict=True)
        )
    # Others keep their sigmas at each step, or look alpha up by the time.
    if _is_one_of(scheduler, BY_INDEX):
        found = levels_of(scheduler)
        return (*(replace(level, t=t) for level, t in zip(found, times, strict=False)), CLEAN)
    squared = scheduler.alphas_cumprod.cpu().double()[scheduler.timesteps.cpu().long()]
    pairs = zip(squared.sqrt().tolist(), (1 - squared).sqrt().tolist(), strict=True)
    return (
        *(
            NoiseLevel(t=t, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)
            for t, (alpha, sigma) in zip(times, pairs, strict=True)
        ),
        CLEAN,
    )


def index_of(scheduler: Any, t: float, before: int | None) -> int:
    """Return the scheduler's place in its grid when it is about to be asked at time t.

    ``before`` is its place at the call before, None at the first.
    """
    # Most schedulers know their place, but only after the first step.
    for known in ("step_index", "begin_index"):
        index = getattr(scheduler, known, None)
        if index is not None:
            return int(index)
    # Otherwise it is found by the time: the first place with it, or the nearest one ahead.
    times = scheduler.timesteps.cpu().double()
    if before is None and hasattr(scheduler, "index_for_timestep") and bool((times == t).any()):
        return int(scheduler.index_for_timestep(scheduler.timesteps[times == t][0]))
    ahead = (times - t).abs()[before or 0 :]
    return (before or 0) + int(ahead.argmin())
