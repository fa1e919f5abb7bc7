"""Noising and reading outputs, written straight from the papers; and one small batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind

KINDS: list[OutputKind] = ["eps", "v", "x_0"]
PROCESSES: list[Process] = [DDPM(), DDPM("cosine"), Flow(), Flow(time_scale=1000)]
COUNT = 5

Batch = tuple[Tensor, Tensor, Tensor]


def batch() -> Batch:
    """Clean images, labels and noise."""
    random = torch.Generator().manual_seed(3)
    x_0, eps = torch.randn(2, COUNT, 4, 8, 8, generator=random)
    return 0.5 * x_0, torch.tensor([0, 3, 10, 9, 1]), eps


def times(process: Process) -> Tensor:
    """Times of every region but the very ends."""
    return process.time_at(torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99]))


def on_curve(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, from the betas or the line."""
    if isinstance(process, Flow):
        u = t / process.time_scale
        alpha, sigma = 1 - u, u
    else:
        assert isinstance(process, DDPM)
        squared = torch.tensor((1 - process.betas).cumprod())[t].float()
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    return alpha[:, None, None, None], sigma[:, None, None, None]


def clean(kind: str, flow: bool, x_t: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x_0 that an output means."""
    if kind == "x_0":
        return out
    if kind == "eps":
        return (x_t - sigma * out) / alpha
    return x_t - sigma * out if flow else alpha * x_t - sigma * out
