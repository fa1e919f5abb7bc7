"""The contract of objectives: (denoiser, x_0, cond) -> one loss per image, and where it was asked.

An objective draws times and noise from torch's own generator, which whoever trains has seeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import NoiseLevel
from sag_dit.tensors import Images


@dataclass(frozen=True)
class Losses:
    """What one batch costs; shapes (b,).

    ``per_image`` is to be averaged and minimised; ``level`` is where each image was asked, its
    ``t`` one time per image; ``terms`` are the parts of a composite loss by name, for logging.

    Example::

        losses = objective(model.denoiser, x_0, labels)
        losses.per_image.mean().backward()
    """

    per_image: Float[Tensor, "b"]
    level: NoiseLevel
    terms: Mapping[str, Float[Tensor, "b"]] = field(default_factory=dict)


class Objective(ABC):
    """What a denoiser is trained to minimise.

    Written by its :meth:`losses` at a given level and noise; the time is uniform unless
    :meth:`quantiles` says otherwise.

    Example::

        @dataclass(frozen=True)
        class AbsoluteError(Objective):
            def losses(self, denoiser, x_0, cond, level, eps) -> Losses:
                x_t = denoiser.process.add_noise(x_0, eps, level)
                error = denoiser(x_t, level, cond).eps - eps
                return Losses(error.abs().flatten(1).mean(dim=1), level)
    """

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027 - most objectives train any denoiser
        """Refuse a denoiser that cannot be trained so, before anything is evaluated.

        Raises:
            ValueError: the process or the network is of a kind this objective is not for.
        """

    def quantiles(self, count: int, device: torch.device) -> Float[Tensor, "b"]:
        """Draw where in the process, from its image (0) to its noise (1), images are asked."""
        # Under 16-bit training the default type has few numbers in [0, 1).
        return torch.rand(count, device=device, dtype=torch.float32)

    @abstractmethod
    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the losses of x_0 noised with eps to one level per image."""

    def __call__(self, denoiser: Denoiser, x_0: Images, cond: Condition) -> Losses:
        """Draw times, then noise, and return the losses there."""
        process = denoiser.process
        level = process.level(process.time_at(self.quantiles(x_0.shape[0], x_0.device)))
        return self.losses(denoiser, x_0, cond, level, torch.randn_like(x_0))


def square_error(output: Images, target: Images) -> Float[Tensor, "b"]:
    """Return |output - target|^2 averaged over channels and pixels, in float32, one per image."""
    return (output.float() - target).square().flatten(1).mean(dim=1)
