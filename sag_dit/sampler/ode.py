"""Euler and Heun: solvers of the ODE of a flow, dx / du = v."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sag_dit.noise import NoiseSource
from sag_dit.process import Flow, NoiseLevel, Process, Step
from sag_dit.sampler.base import Denoise, Sampler, SampleStep, steps_of
from sag_dit.tensors import Images


def require_flow(process: Process, sampler: str) -> Flow:
    """Return the process as a flow, or refuse it.

    Raises:
        ValueError: the process is not a flow.
    """
    if not isinstance(process, Flow):
        raise ValueError(
            f"sampler={sampler}: solves flow models only, and this model's process is "
            f"{type(process).__name__}; use sampler=ddim, sampler=ddpm or one of diffusers' such "
            f"as sampler=dpmpp_2m"
        )
    return process


def length(now: NoiseLevel, after: NoiseLevel) -> float:
    """Return u' - u of a step of a flow, negative towards the image."""
    return float(after.sigma) - float(now.sigma)


@dataclass(frozen=True)
class FlowSampler(Sampler):
    """What both solvers share: the grid they go along.

    ``shift`` spaces the grid instead of the process's own, above 1 for more steps near noise (see
    :class:`sag_dit.process.Flow`); None leaves the process's.

    Example:
        >>> [level.t for level in HeunFlow(shift=3.0).flow(Flow()).grid(2)]
        [1.0, 0.75, 0.0]
    """

    shift: float | None = None
    """Above 1: more of the steps near noise; none: as the model was made."""

    def __post_init__(self) -> None:
        if self.shift is not None:
            Flow(shift=self.shift)

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process that is no flow, and impossible numbers of steps."""
        self.flow(process).check_steps(num_steps)

    def flow(self, process: Process) -> Flow:
        """Return the process with this sampler's grid, or refuse it."""
        flow = require_flow(process, self.key)
        return flow if self.shift is None else replace(flow, shift=self.shift)


@dataclass(frozen=True)
class EulerFlow(FlowSampler):
    """Euler's method: x_next = x + (u' - u) v. Order 1, one evaluation a step.

    The last step returns the predicted x_0. No noise is drawn.

    Source: Liu et al. 2023 (rectified flow), section 2.

    Example::

        sag_dit.sample(model, [3, 7], sampler=EulerFlow(shift=3.0), steps=50)
    """

    key = "euler_flow"
    former = ("EulerFlow",)
    renoises = True

    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield Euler steps; see :meth:`Sampler.steps`."""
        for step in steps_of(self.flow(process), num_steps):
            prediction = denoise(x, step)
            clamped = prediction.clamped(x_0_range)
            x = clamped.x_t + length(step.level, step.next) * clamped.v
            yield SampleStep(step, x, prediction)


@dataclass(frozen=True)
class HeunFlow(FlowSampler):
    """Heun's method: x' = x + h v(x, u), then x_next = x + h (v(x, u) + v(x', u')) / 2.

    Order 2, with two evaluations a step. The last step is Euler's, since the network is not asked
    at u' = 0. Each evaluation is one step of the run: ``num_steps`` steps of the grid make 2
    num_steps - 1, and the second of each pair ends at the level where it begins. No noise is drawn.

    Source: Karras et al. 2022, algorithm 1.

    Example::

        sag_dit.sample(model, [3, 7], sampler=HeunFlow(), steps=25)
    """

    key = "heun_flow"
    former = ("HeunFlow",)

    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield one step per evaluation of the network; see :meth:`Sampler.steps`."""
        count = 2 * num_steps - 1
        for taken in steps_of(self.flow(process), num_steps):
            now, after = taken.level, taken.next
            h = length(now, after)
            first = Step(2 * taken.index, count, now, after, evaluations=2)
            prediction = denoise(x, first)
            v = prediction.clamped(x_0_range).v
            # Euler's step is a first guess.
            guess = x + h * v
            yield SampleStep(first, guess, prediction)
            if taken.index == num_steps - 1:
                return
            # Ask again where it ends, and take the step with the mean of both velocities.
            second = Step(first.index + 1, count, after, after, evaluations=2)
            prediction = denoise(guess, second)
            x = x + h * (v + prediction.clamped(x_0_range).v) / 2
            yield SampleStep(second, x, prediction)
