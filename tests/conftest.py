"""Fixtures shared by all tests: tiny models that attend unevenly, and a repeatable hypothesis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM

# The same examples on every machine; no database, so no folder is left behind.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")

MakeDiT = Callable[..., DiT]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors run faster on one thread, and sums keep their order."""
    torch.set_num_threads(1)


@pytest.fixture
def make_dit() -> MakeDiT:
    """Build a tiny DiT none of whose weights is zero, so that every part of it matters."""

    def make(seed: int = 0, **options: object) -> DiT:
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

    return make


@pytest.fixture
def tiny_dit(make_dit: MakeDiT) -> DiT:
    """8x8 latents of 4 channels in 4x4 tokens, 3 blocks, 10 classes, learned variance."""
    return make_dit()


@pytest.fixture
def wide_dit(make_dit: MakeDiT) -> DiT:
    """A rectangular grid, 8x12 pixels in 4x6 tokens."""
    return make_dit(input_size=(8, 12))


@pytest.fixture
def denoiser(tiny_dit: DiT) -> ClassConditional:
    """The tiny DiT as a denoiser of the linear process."""
    return ClassConditional(tiny_dit, DDPM())


@pytest.fixture
def wide_denoiser(wide_dit: DiT) -> ClassConditional:
    """The rectangular DiT as a denoiser of the linear process."""
    return ClassConditional(wide_dit, DDPM())
