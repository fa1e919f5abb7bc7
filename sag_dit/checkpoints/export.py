"""Writing our own layout: a folder of model.safetensors and config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sag_dit.checkpoints.config import describe
from sag_dit.checkpoints.files import METADATA_KEY
from sag_dit.denoiser import ClassConditional


def write_safetensors(
    folder: str | Path, denoiser: ClassConditional, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a denoiser's weights and config, each atomically, and return the weights' path.

    ``extra`` joins the config; ``vae`` and ``defaults`` are what a denoiser does not know. The
    config is also in the safetensors' metadata, so that the file alone can be loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**describe(denoiser), **(extra or {})}
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in denoiser.network.state_dict().items()
    }
    weights, text = folder / "model.safetensors", folder / "config.json"
    parts = weights.with_suffix(".part"), text.with_suffix(".part")
    save_file(state, parts[0], metadata={METADATA_KEY: json.dumps(config)})
    parts[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(parts[1], text)
    os.replace(parts[0], weights)
    return weights
