"""DDIM: the deterministic solver, with eta between it and ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sag_dit.noise import NoiseSource
from sag_dit.process import Process
from sag_dit.sampler.base import Denoise, Sampler, SampleStep, require_ddpm, steps_of
from sag_dit.tensors import Images


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models.

    x_next = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z with s = eta (sigma' / sigma) sqrt(1 -
    alpha^2 / alpha'^2), z standard normal; primes mark the next level. eta = 0 draws no noise,
    eta = 1 has the posterior's variance.

    Source: Song et al. 2021, equations 12 and 16.

    Raises:
        ValueError: eta is not in [0, 1].

    Example::

        sag_dit.sample(model, [3, 7], sampler=DDIM(eta=0.5), steps=50)
    """

    key = "ddim"
    former = ("DDIM",)
    renoises = True

    eta: float = 0.0
    """0: no noise along the way; 1: as much as ancestral sampling."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: expected 0 (deterministic) to 1 (ancestral)")

    @property
    def steerable(self) -> bool:
        """Whether steps draw noise; see :attr:`Sampler.steerable`."""
        return self.eta > 0

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process that is not variance preserving, and impossible numbers of steps."""
        require_ddpm(process, "ddim")
        super().check(process, num_steps)

    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield DDIM steps; see :meth:`Sampler.steps`."""
        self.check(process, num_steps)
        for step in steps_of(process, num_steps):
            prediction = denoise(x, step)
            clamped = prediction.clamped(x_0_range)
            # How much fresh noise the step adds: none at eta = 0.
            now, after = step.level, step.next
            s = (
                self.eta
                * (float(after.sigma) / float(now.sigma))
                * math.sqrt(1 - float(now.alpha) ** 2 / float(after.alpha) ** 2)
            )
            # Point from the predicted x_0 to the next level along the predicted noise.
            direction = math.sqrt(max(float(after.sigma) ** 2 - s**2, 0.0))
            x = after.alpha * clamped.x_0 + direction * clamped.eps
            if s > 0:
                x = x + s * noise.like(x, step.index)
            yield SampleStep(step, x, prediction)
