"""Flow matching: the mean squared error of the velocity, at uniform or logit-normal times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import Flow, NoiseLevel
from sag_dit.tensors import Images
from sag_dit.training.objective.base import Losses, Objective
from sag_dit.training.objective.squared_error import mse

Times = Literal["uniform", "logit_normal"]

BELOW_ONE = 1 - 2**-24
"""The largest float32 number below 1."""


@dataclass(frozen=True)
class FlowMatching(Objective):
    """|v_theta(x_t, t) - (eps - x_0)|^2, averaged over channels and pixels.

    ``times``: ``uniform``, or ``logit_normal``: u = sigmoid(n), n ~ N(mean, std^2), which asks
    more often in the middle. A positive mean leans towards noise; mean = log s is what a shift of
    the process by s does to times drawn with mean 0.

    Source: Lipman et al. 2023; uniform: Ma et al. 2024 (SiT); logit-normal: Esser et al. 2024
    (Stable Diffusion 3), equation 19, where mean 0 and std 1 did best.

    Raises:
        ValueError: unknown ``times``, a ``mean`` or ``std`` that no distribution has, or one that
            uniform times do not look at.

    Example::

        losses = FlowMatching(times="logit_normal")(model.denoiser, x_0, labels)
    """

    key = "flow"
    former = (
        "sag_dit.training.objective.FlowMatching",
        "sag_dit.training.objective.flow.FlowMatching",
    )

    times: Times = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"times={self.times!r}: expected 'uniform' or 'logit_normal'")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}: expected a finite number; 0 is usual")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std}: expected a finite number above 0; 1 is usual")
        for name in ("mean", "std") if self.times == "uniform" else ():
            if getattr(self, name) != getattr(FlowMatching, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}: uniform times have none: expected "
                    f"times=logit_normal beside it, or {name} left out"
                )

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a process that is no flow, and a network that does not put out v."""
        if not isinstance(denoiser.process, Flow):
            raise ValueError(
                f"objective=flow: expected a Flow process, and this model's is "
                f"{type(denoiser.process).__name__}; use objective=mse, dit or min_snr"
            )
        if denoiser.kind != "v":
            raise ValueError(
                f"objective=flow: expected a network of kind 'v', and this one's is "
                f"{denoiser.kind!r}; use kind=v, or objective=mse"
            )

    def quantiles(self, count: int, device: torch.device) -> Float[Tensor, "b"]:
        """Draw uniform or logit-normal times in [0, 1)."""
        if self.times == "uniform":
            return super().quantiles(count, device)
        normal = torch.randn(count, device=device, dtype=torch.float32)
        return torch.sigmoid(self.mean + self.std * normal).clamp(max=BELOW_ONE)

    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the mean squared errors of v."""
        return Losses(mse(denoiser, x_0, cond, level, eps), level)
