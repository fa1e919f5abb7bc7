"""Euler-Maruyama: the solver of a flow's reverse SDE, which draws noise along the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from sag_dit.noise import NoiseSource
from sag_dit.process import NoiseLevel, Process, Step
from sag_dit.process.flow import shifted
from sag_dit.sampler.base import Denoise, SampleStep
from sag_dit.sampler.ode import FlowSampler, length
from sag_dit.tensors import Images

Diffusion = Literal["sigma", "constant", "sbdm", "decreasing", "increasing_decreasing"]


@dataclass(frozen=True)
class EulerMaruyama(FlowSampler):
    """Euler-Maruyama on dx = (v + w eps / sigma) du + sqrt(2 w) dW, for u from 1 to 0.

    x_next = x - h (v + w eps / sigma) + sqrt(2 w h) z with h = u - u'; every w gives the same
    marginals, and w = 0 is the ODE. ``diffusion`` chooses w(u), with alpha = 1 - u, sigma = u and
    ``norm`` = k: ``sigma`` k sigma, ``constant`` k, ``sbdm`` k sigma / alpha, ``decreasing``
    (1 - k cos(pi u))^2 / 4, ``increasing_decreasing`` k sin^2(pi u). The last step has length
    ``last_step`` and draws no noise; the steps before it are even.

    Source: Ma et al. 2024 (SiT), equation 5 and table 2; their "Mean" last step.

    Raises:
        ValueError: an unknown ``diffusion``, a negative ``norm``, or a ``last_step`` not in (0, 1).

    Example::

        sag_dit.sample(model, [3, 7], sampler=EulerMaruyama(diffusion="constant"), steps=250)
    """

    key = "sde_flow"
    former = ("EulerMaruyama",)
    renoises = True

    diffusion: Diffusion = "sigma"
    """How the noise that is added changes along the way."""
    norm: float = 1.0
    """How much noise is added; 0: none."""
    last_step: float = 0.04
    """The length of the last step, which adds none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion not in get_args(Diffusion):
            raise ValueError(
                f"diffusion={self.diffusion!r}: expected {', '.join(get_args(Diffusion))}"
            )
        if not 0 <= self.norm < math.inf:
            raise ValueError(f"norm={self.norm}: expected 0 (no noise) or more; 1 is usual")
        if not 0 < self.last_step < 1:
            raise ValueError(f"last_step={self.last_step}: expected between 0 and 1; 0.04 is SiT's")

    @property
    def steerable(self) -> bool:
        """Whether steps draw noise; see :attr:`Sampler.steerable`."""
        return self.norm > 0

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process that is no flow, impossible steps, and an infinite diffusion."""
        super().check(process, num_steps)
        start = self.flow(process).start
        if self.diffusion == "sbdm" and start == 1:
            raise ValueError(
                "diffusion='sbdm' is infinite at pure noise, where this model's process starts; "
                "use another, such as sampler.diffusion=sigma"
            )
        if self.last_step >= start:
            raise ValueError(f"last_step={self.last_step}: expected less than {start}, the start")

    def strength(self, level: NoiseLevel) -> float:
        """Return w at a level."""
        k, alpha, sigma = self.norm, float(level.alpha), float(level.sigma)
        if self.diffusion == "sigma":
            return k * sigma
        if self.diffusion == "sbdm":
            return k * sigma / alpha
        if self.diffusion == "decreasing":
            return 0.25 * (1 - k * math.cos(math.pi * sigma)) ** 2
        if self.diffusion == "increasing_decreasing":
            return k * math.sin(math.pi * sigma) ** 2
        return k

    def grid(self, process: Process, num_steps: int) -> tuple[NoiseLevel, ...]:
        """Return ``num_steps`` levels, evenly from the start to the last step, and the clean one.

        A ``shift`` moves those between as in :class:`sag_dit.process.Flow`.
        """
        self.check(process, num_steps)
        flow = self.flow(process)
        span = 1 - self.last_step / flow.start
        shares = (
            [1 - span * i / (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [1]
        )
        times = [flow.start * shifted(share, flow.shift) for share in shares]
        return tuple(flow.level(u * flow.time_scale) for u in (*times, 0.0))

    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield Euler-Maruyama steps; see :meth:`Sampler.steps`."""
        grid = self.grid(process, num_steps)
        for index in range(num_steps):
            step = Step(index, num_steps, grid[index], grid[index + 1])
            prediction = denoise(x, step)
            clamped = prediction.clamped(x_0_range)
            # The drift, then noise unless the image is done.
            h, w = -length(step.level, step.next), self.strength(step.level)
            x = clamped.x_t - h * (clamped.v + w / float(step.level.sigma) * clamped.eps)
            if w > 0 and index < num_steps - 1:
                x = x + math.sqrt(2 * w * h) * noise.like(x, index)
            yield SampleStep(step, x, prediction)
