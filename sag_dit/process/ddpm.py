"""The discrete variance-preserving process of DDPM, with ADM's respacing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.process.base import NoiseLevel, Process

CLEAN = NoiseLevel(t=0.0, alpha=1.0, sigma=0.0, d_alpha=0.0, d_sigma=1.0)


def linear_betas(num_timesteps: int) -> NDArray[np.float64]:
    """Betas rising linearly from 1e-4 to 0.02 at 1,000 steps, scaled to other step counts.

    Source: Ho et al. 2020, section 4; the scaling is guided-diffusion's.
    """
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)


def scaled_linear_betas(num_timesteps: int) -> NDArray[np.float64]:
    """Betas whose roots rise linearly, from 8.5e-4 to 0.012 at 1,000 steps, scaled to others.

    Source: Rombach et al. 2022 (latent diffusion), the code of Stable Diffusion.
    """
    scale = 1000 / num_timesteps
    return np.linspace(8.5e-4**0.5, 0.012**0.5, num_timesteps, dtype=np.float64) ** 2 * scale


def cosine_betas(num_timesteps: int) -> NDArray[np.float64]:
    """Betas of alpha_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2), capped at 0.999.

    Source: Nichol & Dhariwal 2021, equation 17.
    """

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [
            min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), 0.999)
            for i in range(num_timesteps)
        ]
    )


BETAS: Mapping[str, Callable[[int], NDArray[np.float64]]] = {
    "scaled_linear": scaled_linear_betas,
    "linear": linear_betas,
    "cosine": cosine_betas,
}


def respace(num_timesteps: int, steps: int) -> list[int]:
    """Choose ``steps`` of the original times, both ends included, with a fractional stride.

    t_i = round(i (T - 1) / (S - 1)). Rounding is to even, and the stride is accumulated in double
    precision, as in ADM, so that the same times are chosen. A single step starts from noise, at
    T - 1; ADM's code would start it at 0, where the image is already clean.
    Source: guided-diffusion, respace.py.
    """
    if steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (steps - 1)
    times, position = [], 0.0
    for _ in range(steps):
        times.append(round(position))
        position += stride
    return times


@dataclass(frozen=True)
class DDPM(Process):
    """The discrete variance-preserving process, alpha_t^2 = prod_{s<=t} (1 - beta_s).

    Times are 0 to ``num_timesteps`` - 1. The network is always told the original time, also on a
    grid of fewer steps. Tables are float64.

    Example:
        >>> [level.t for level in DDPM().grid(3)]
        [999.0, 500.0, 0.0, 0.0]
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.schedule not in BETAS:
            raise ValueError(
                f"schedule={self.schedule!r}: expected {' or '.join(map(repr, BETAS))}, the "
                f"published betas"
            )
        # Below 21 steps the scaled linear betas would exceed 1; each has its place in a table.
        if not 21 <= self.num_timesteps <= 1_000_000:
            raise ValueError(
                f"num_timesteps={self.num_timesteps}: expected 21 or more, and at most 1,000,000"
            )

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        """A respaced grid visits each original time at most once."""
        return self.num_timesteps

    def elapsed(self, level: NoiseLevel) -> float:
        """Return t / ``num_timesteps``."""
        return float(level.t) / self.num_timesteps

    @cached_property
    def betas(self) -> NDArray[np.float64]:
        """Variance added by each step, shape (num_timesteps,)."""
        return BETAS[self.schedule](self.num_timesteps)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """alpha_t squared, shape (num_timesteps,)."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def _alpha_sigma(self) -> Tensor:
        squared = torch.from_numpy(self.alphas_cumprod)
        return torch.stack([squared.sqrt(), (1 - squared).sqrt()])

    def level(self, t: float | Tensor) -> NoiseLevel:
        """Return the level of an integral time, or of one integral time per image."""
        if isinstance(t, Tensor):
            # float32 before the device: not every device has float64.
            table = self._alpha_sigma.float().to(t.device)
            alpha, sigma = table[:, t.long()][..., None, None, None]
            return NoiseLevel(t=t, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)
        if not float(t).is_integer() or not 0 <= t < self.num_timesteps:
            raise ValueError(
                f"t={t}: expected a whole number from 0 to {self.num_timesteps - 1}; "
                f"a discrete process has no level between its times"
            )
        alpha, sigma = (float(value) for value in self._alpha_sigma[:, int(t)])
        return NoiseLevel(t=float(t), alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)

    def time_at(self, u: Tensor) -> Tensor:
        """Return whole times floor(u num_timesteps)."""
        return (u * self.num_timesteps).long()

    def grid(self, steps: int) -> tuple[NoiseLevel, ...]:
        """Return the levels of ADM's respacing, noisiest first, and the clean level."""
        self.check_steps(steps)
        times = reversed(respace(self.num_timesteps, steps))
        return (*(self.level(t) for t in times), CLEAN)


@dataclass(frozen=True)
class Posterior:
    """q(x_next | x_t, x_0) of every step of a grid, as coefficients of its mean and log-variances.

    mean = of_x_0 x_0 + of_x_t x_t. ``log_lower`` is the posterior's own variance (beta tilde),
    ``log_upper`` that of the forward step (beta): the bounds of a learned variance.
    Source: Ho et al. 2020, equations 6 and 7; Nichol & Dhariwal 2021, equation 15.

    Example:
        >>> posterior = Posterior.of(DDPM().grid(50))
        >>> len(posterior.of_x_0)
        50
    """

    of_x_0: tuple[float, ...]
    of_x_t: tuple[float, ...]
    log_lower: tuple[float, ...]
    log_upper: tuple[float, ...]
    log_large: tuple[float, ...]

    @classmethod
    def of(cls, grid: Sequence[NoiseLevel]) -> Posterior:
        """Compute the coefficients for a decreasing grid that ends clean."""
        alpha_bar = np.array([float(level.alpha) ** 2 for level in grid])
        now, after = alpha_bar[:-1], alpha_bar[1:]
        beta = 1 - now / after
        lower = beta * (1 - after) / (1 - now)
        # The last step's posterior variance is 0, so that of the step before is used, as published.
        # A grid of one step has no step before; no noise is drawn there in any case.
        lower[-1] = lower[-2] if len(lower) > 1 else beta[-1]
        large = beta.copy()
        large[-1] = lower[-1]
        return cls(
            of_x_0=tuple(beta * np.sqrt(after) / (1 - now)),
            of_x_t=tuple((1 - after) * np.sqrt(now / after) / (1 - now)),
            log_lower=tuple(np.log(lower)),
            log_upper=tuple(np.log(beta)),
            log_large=tuple(np.log(large)),
        )
