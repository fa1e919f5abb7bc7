"""Objectives: what a denoiser is trained to minimise."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import NoiseLevel
from sag_dit.tensors import Images


def mse(
    denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
) -> Float[Tensor, "b"]:
    """Return the mean squared error of the network's own output, one number per image.

    |output - target|^2 averaged over channels and pixels, target being eps, v or x_0 as the
    denoiser's ``kind`` has it.

    Source: Ho et al. 2020, equation 14.
    """
    process = denoiser.process
    x_t = process.add_noise(x_0, eps, level)
    output = denoiser.evaluate(x_t, level.times(x_t), cond)[:, : x_0.shape[1]]
    target = process.target(x_0, eps, level, denoiser.kind)
    return (output.float() - target).square().flatten(1).mean(dim=1)
