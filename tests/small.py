"""A tiny DiT that attends unevenly, and its denoiser."""

from __future__ import annotations

import torch

from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM


def dit(seed: int = 0, **options: object) -> DiT:
    """Build a tiny DiT none of whose weights is zero, so that every part of it matters."""
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
    network = DiT(**{**defaults, **options})  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name == "pos_embed":
            continue
        spread = 0.1 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
        values = torch.randn(parameter.shape, generator=random) * spread
        parameter.data.copy_(values)
    return network.eval().requires_grad_(False)


def denoiser(network: DiT) -> ClassConditional:
    """Its denoiser of the linear process."""
    return ClassConditional(network, DDPM())
