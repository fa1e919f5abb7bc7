"""Min-SNR-gamma: a mean squared error whose easy, nearly clean times weigh no more than gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import NoiseLevel
from sag_dit.process.base import OutputKind
from sag_dit.tensors import Images
from sag_dit.training.objective.base import Losses, Objective
from sag_dit.training.objective.squared_error import mse


def min_snr_weight(level: NoiseLevel, kind: OutputKind, gamma: float) -> Tensor:
    """Return the weight of a network's squared error: min(SNR, gamma) on that of its x_0.

    With SNR = alpha^2 / sigma^2, an error of v is 1 / sigma of one of x_0, and an error of eps
    alpha / sigma of it. Hence min(SNR, gamma) for x_0; min(alpha^2, gamma sigma^2) for v, which is
    the paper's min(SNR, gamma) / (SNR + 1) where alpha^2 + sigma^2 = 1, and holds for a flow as
    well; min(1, gamma / SNR) for eps, sigma^2 times that for the score. All are finite at the
    ends.

    Args:
        level: tensors, one level per image.
        kind: what the network puts out.
        gamma: the largest weight.

    Returns:
        One weight per image, shape (b,).

    Source: Hang et al. 2023, section 3.4.
    """
    alpha, sigma = torch.as_tensor(level.alpha).square(), torch.as_tensor(level.sigma).square()
    if kind == "x_0":
        weight = (alpha / sigma).clamp(max=gamma)
    elif kind == "eps":
        weight = (gamma * sigma / alpha).clamp(max=1)
    elif kind == "score":
        weight = (gamma * sigma / alpha).clamp(max=1) * sigma
    else:
        weight = torch.minimum(alpha, gamma * sigma)
    return weight.flatten()


@dataclass(frozen=True)
class MinSNR(Objective):
    """The mean squared error of eps, v, x_0 or the score, weighted by min(SNR, gamma).

    Times are uniform.

    Source: Hang et al. 2023, arXiv 2303.09556; gamma = 5 there.

    Raises:
        ValueError: gamma is not a finite number above 0.

    Example::

        losses = MinSNR(gamma=5.0)(model.denoiser, x_0, labels)
    """

    key = "min_snr"
    former = ("sag_dit.training.objective.MinSNR", "sag_dit.training.objective.min_snr.MinSNR")

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma}: expected a number above 0; 5 is the paper's")

    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the weighted errors, and the unweighted ones as the term ``mse``."""
        error = mse(denoiser, x_0, cond, level, eps)
        weight = min_snr_weight(level, denoiser.kind, self.gamma)
        return Losses(weight * error, level, {"mse": error.detach()})
