"""Small networks whose weights are random, and none of them zero, so that every part matters."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM

Network = TypeVar("Network", bound=nn.Module)


def filled(network: Network, seed: int = 0, of_vectors: float = 0.1) -> Network:
    """Give every weight a random value, but not the positions, and return the network.

    Matrices are such that attention is uneven; ``of_vectors`` is the deviation of biases and gains.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            spread = of_vectors if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * spread)
    return network


def dit(seed: int = 0, **options: object) -> DiT:
    """A DiT of 4 x 4 tokens and three blocks."""
    defaults: dict[str, object] = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 48,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 10,
        "learn_sigma": True,
    }
    network = filled(DiT(**{**defaults, **options}), seed)  # type: ignore[arg-type]
    return network.eval().requires_grad_(False)


def denoiser(network: DiT) -> ClassConditional:
    """Its denoiser of the linear process."""
    return ClassConditional(network, DDPM())
