"""DDIM on the times of its own paper: an integer stride from 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, NoiseLevel, Process
from sag_dit.process.ddpm import CLEAN
from sag_dit.sampler.base import Denoise, SampleStep, require_ddpm
from sag_dit.sampler.ddim import DDIM
from sag_dit.tensors import Images


def stride(num_timesteps: int, steps: int) -> int:
    """Return the smallest whole stride that visits ``steps`` of the times, from 0 on.

    Raises:
        ValueError: there is none.
    """
    for candidate in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, candidate)) == steps:
            return candidate
    raise ValueError(
        f"steps={steps}: no whole stride visits so many of {num_timesteps} times; use a divisor, "
        f"such as 25 or 50, or sampler=ddim, whose stride may be a fraction"
    )


class StridedDDPM(DDPM):
    """The discrete process with grids of the times 0, s, 2 s, ...

    Example:
        >>> [level.t for level in StridedDDPM().grid(4)]
        [750.0, 500.0, 250.0, 0.0, 0.0]
    """

    def grid(self, steps: int) -> tuple[NoiseLevel, ...]:
        """Return the levels of these times, noisiest first, and the clean level."""
        self.check_steps(steps)
        times = range(0, self.num_timesteps, stride(self.num_timesteps, steps))
        return (*(self.level(t) for t in reversed(times)), CLEAN)


@dataclass(frozen=True)
class StridedDDIM(DDIM):
    """DDIM on the times 0, s, 2 s, ..., which guided-diffusion calls ``ddim25`` and so on.

    With 25 of 1,000 steps it starts at t = 960, and :class:`DDIM` at 999.

    Source: Song et al. 2021, section D.2; guided-diffusion, respace.py.

    Example::

        sag_dit.sample(model, [3, 7], sampler=StridedDDIM(), steps=25)
    """

    key = "ddim_strided"
    former = ("StridedDDIM",)

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse what DDIM refuses, and numbers of steps without a stride."""
        super().check(process, num_steps)
        strided(process).grid(num_steps)

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
        return super().steps(denoise, x, strided(process), num_steps, noise, x_0_range)


def strided(process: Process) -> StridedDDPM:
    """Return the same process with strided grids.

    Raises:
        ValueError: it is not variance preserving.
    """
    require_ddpm(process, "ddim_strided")
    return StridedDDPM(**{field.name: getattr(process, field.name) for field in fields(DDPM)})
