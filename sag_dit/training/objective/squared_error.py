"""The mean squared error of what the network puts out: eps, v, x_0 or the score."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import NoiseLevel
from sag_dit.tensors import Images
from sag_dit.training.objective.base import Losses, Objective, square_error


def mse(
    denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
) -> Float[Tensor, "b"]:
    """Return the mean squared error of the network's own output, one number per image.

    |output - target|^2 averaged over channels and pixels. The target is eps, v, x_0 or the score,
    by the denoiser's ``kind``. Variance channels are not trained.

    Source: Ho et al. 2020, equation 14; for v, Salimans & Ho 2022, section 4.

    Example::

        errors = mse(denoiser, x_0, cond, level, eps)
        loss = errors.mean()
    """
    process = denoiser.process
    x_t = process.add_noise(x_0, eps, level)
    output = denoiser.evaluate(x_t, level.times(x_t), cond)[:, : x_0.shape[1]]
    return square_error(output, process.target(x_0, eps, level, denoiser.kind))


@dataclass(frozen=True)
class MSE(Objective):
    """The mean squared error of eps, v, x_0 or the score, by the denoiser's kind.

    Times are uniform.

    Source: Ho et al. 2020, equation 14; for v, Salimans & Ho 2022, section 4.

    Example::

        losses = MSE()(model.denoiser, x_0, labels)
    """

    key = "mse"
    former = ("sag_dit.training.objective.MSE", "sag_dit.training.objective.squared_error.MSE")

    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the mean squared errors."""
        return Losses(mse(denoiser, x_0, cond, level, eps), level)
