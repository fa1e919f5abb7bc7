"""A denoiser that knows the answer: data of independent Gaussian pixels, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sag_dit.noise import NoiseSource
from sag_dit.process import NoiseLevel, Prediction, Process, Step
from sag_dit.sampler import Denoise, Sampler, SampleStep


@dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mean, std^2) for each pixel, one mean and one std for each column of an image."""

    mean: tuple[float, ...] = (0.6, -0.3, 0.1, -0.8)
    std: tuple[float, ...] = (0.5, 0.25, 0.1, 0.8)

    def standardised(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Where x_t lies in N(alpha mean, alpha^2 std^2 + sigma^2): what the exact ODE keeps."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        spread = (level.alpha**2 * std**2 + level.sigma**2) ** 0.5
        return (x_t.double() - level.alpha * mean) / spread

    def predict(self, x_t: Tensor, level: NoiseLevel) -> Prediction:
        """E[v | x_t], from nothing but x_t, alpha and sigma."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        variance = level.alpha**2 * std**2 + level.sigma**2
        off = (x_t.double() - level.alpha * mean) / variance
        x_0 = mean + level.alpha * std**2 * off
        v = level.d_alpha * x_0 + level.d_sigma * level.sigma * off
        return Prediction(x_t, level, v.to(x_t.dtype))

    def end(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """The clean image to which the exact probability-flow ODE carries x_t."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        return mean + std * self.standardised(x_t, level)


@dataclass
class Recorder:
    """A denoise function that remembers what it was asked."""

    answer: Callable[[Tensor, NoiseLevel], Prediction]
    asked: list[tuple[Tensor, Step]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, step: Step) -> Prediction:
        self.asked.append((x_t, step))
        return self.answer(x_t, step.level)


def noise_of(count: int, seed: int = 0) -> NoiseSource:
    """The randomness of images 0 to count - 1."""
    return NoiseSource([seed] * count, range(count))


def start(count: int = 6, size: tuple[int, int] = (4, 4), seed: int = 0) -> Tensor:
    """x_T of images 0 to count - 1, one channel."""
    return noise_of(count, seed).normal(0, (1, *size))


def run(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    process: Process,
    steps: int,
    x_0_range: tuple[float, float] | None = None,
) -> list[SampleStep]:
    """All steps of one run."""
    return list(sampler.steps(denoise, x, process, steps, noise_of(len(x)), x_0_range))
