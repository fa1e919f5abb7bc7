"""Ancestral sampling of DDPM, with learned or fixed variance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Process
from sag_dit.process.ddpm import Posterior
from sag_dit.sampler.base import Denoise, Sampler, SampleStep, require_ddpm, steps_of
from sag_dit.tensors import Images

Variance = Literal["auto", "learned", "fixed_small", "fixed_large"]


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling: x_next = mean(x_t, x_0) + exp(log_variance / 2) z.

    ``variance``: ``learned`` interpolates between the posterior's variance and the forward step's
    as the network says (IDDPM, DiT, ADM); ``fixed_small`` is the posterior's, ``fixed_large`` the
    forward step's; ``auto`` is learned where the network has learned it, else fixed_large, the
    published default. The last step draws no noise.

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15.

    Example::

        sag_dit.sample(model, [3, 7], sampler=Ancestral(), steps=250)
    """

    key = "ddpm"
    former = ("Ancestral",)
    renoises = True

    variance: Variance = "auto"
    """Of the noise of a step; auto: learned where the network has learned it."""

    def __post_init__(self) -> None:
        if self.variance not in ("auto", "learned", "fixed_small", "fixed_large"):
            raise ValueError(
                f"variance={self.variance!r}: expected auto, learned, fixed_small or fixed_large"
            )

    def log_variance(self, posterior: Posterior, index: int, prediction: Prediction) -> Images:
        """Return the log-variance of one step, shaped to broadcast over the images.

        Raises:
            ValueError: ``learned`` is asked of a network that predicts no variance.
        """
        lower, upper = posterior.log_lower[index], posterior.log_upper[index]
        fraction = prediction.variance_fraction
        if self.variance == "learned" or (self.variance == "auto" and fraction is not None):
            if fraction is None:
                raise ValueError(
                    "variance='learned': this network predicts no variance (learn_sigma=False); "
                    "use sampler.variance=fixed_large or fixed_small"
                )
            return fraction * upper + (1 - fraction) * lower
        fixed = lower if self.variance == "fixed_small" else posterior.log_large[index]
        return torch.full((1, 1, 1, 1), fixed, device=prediction.x_t.device)

    @property
    def steerable(self) -> bool:
        """Each step draws noise; see :attr:`Sampler.steerable`."""
        return True

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process that is not variance preserving, and impossible numbers of steps."""
        require_ddpm(process, "ddpm")
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
        """Yield ancestral steps; see :meth:`Sampler.steps`."""
        self.check(process, num_steps)
        posterior = Posterior.of(process.grid(num_steps))
        for step in steps_of(process, num_steps):
            i = step.index
            prediction = denoise(x, step)
            clamped = prediction.clamped(x_0_range)
            # The mean of the posterior for the predicted x_0, and noise unless the image is done.
            mean = posterior.of_x_0[i] * clamped.x_0 + posterior.of_x_t[i] * clamped.x_t
            log_variance = self.log_variance(posterior, i, prediction)
            if i < num_steps - 1:
                x = mean + torch.exp(0.5 * log_variance) * noise.like(x, i)
            else:
                x = mean
            yield SampleStep(step, x, prediction)
