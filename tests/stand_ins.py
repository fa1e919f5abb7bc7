"""Small stand-ins of published weights: the original names and formats, nothing trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import randomise
from sag_dit.models import DiT
from sag_dit.models.unet import adapter
from tests.checkpoints.openai import shapes
from tests.data import making

NARROW = {"model_channels": 32, "channel_mult": (1, 1, 2, 2), "attending": (1, 2, 3)}
"""Sizes of a stand-in's levels: three of four attend, as in ADM, on grids of 16, 8 and 4."""
SIDE = 32
"""Its images."""
SPREAD = 0.02


def save_dit(path: Path, in_channels: int, input_size: int = 8) -> Path:
    """Write a small DiT of 1000 classes, none of whose weights is zero, as the official .pt is."""
    torch.manual_seed(0)
    network = DiT(input_size, 2, in_channels, 64, 2, 1, num_classes=1000)
    randomise(network)
    torch.save(network.state_dict(), path)
    return path


def save_vae(folder: Path) -> None:
    """Write a small autoencoder of 4 latent channels, 2 pixels a cell, scaled as the published."""
    making.save_vae(folder, scaling_factor=0.18215, shift_factor=None)


def save_openai(
    folder: Path, file: str, stated: Mapping[str, object] | None = None, **changed: object
) -> Path:
    """Write a narrow network under the name of a published one of ADM, IDDPM or a classifier.

    Classes and number of residual blocks are the original's. The config beside it states what
    its weights do not tell: heads of 8 channels, 16 of them at the bottom where ADM has 16.
    """
    variant = adapter.by_file(file)
    assert variant is not None
    sizes = replace(variant.sizes, **{**NARROW, **changed})
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=random) * SPREAD for name, shape in shapes(sizes, SIDE)
    }
    torch.save(state, folder / file)
    heads = {"num_heads": 4} if "num_heads" in variant.arguments else {"num_head_channels": 8}
    model = {"input_size": SIDE, **heads, **(stated or {})}
    (folder / file).with_suffix(".json").write_text(json.dumps({"model": model}))
    return folder / file
