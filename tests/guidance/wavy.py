"""A denoiser whose network is a formula, so that other code can be run on the same one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sag_dit.denoiser import Denoiser
from sag_dit.process import Process
from sag_dit.process.base import OutputKind

START = torch.linspace(-1.5, 2.0, 8).view(1, 1, 2, 4)
"""The noise that runs begin with."""


def wavy(x: Tensor, t: Tensor | float, c: Tensor | float) -> Tensor:
    """What the network puts out at a time from 0 to 1; c is 1 for the condition and 0 for null."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1) + 0.5 * c + 0.2 * t) * (0.6 + 0.4 * c)


class Wavy(Denoiser):
    """The formula as a denoiser; ``time_scale`` is the process's time of pure noise."""

    def __init__(self, process: Process, kind: OutputKind, time_scale: float) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.process, self.kind, self.time_scale = process, kind, time_scale
        self.latent_shape, self.x_0_range, self.layers = (1, 2, 4), None, {}

    def evaluate(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        time = t.to(x_t.dtype).view(-1, 1, 1, 1) / self.time_scale
        return wavy(x_t, time, cond.to(x_t.dtype).view(-1, 1, 1, 1))

    def null(self, count: int) -> Tensor:
        return torch.zeros(count)

    def join(self, conditions: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(conditions))
