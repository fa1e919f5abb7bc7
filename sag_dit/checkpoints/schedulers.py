"""What a diffusers scheduler's config says of the process that a network was trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np

from sag_dit.checkpoints import files
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import BETAS

KINDS: dict[str, OutputKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


def read_scheduler(path: Path, cells: tuple[int, int] = (0, 0)) -> tuple[Process, OutputKind]:
    """Return the process and kind that a scheduler's config states, for an image of so many cells.

    Raises:
        ValueError: the betas or the prediction type are not known.
    """
    # A flow states where it puts its steps, perhaps by the size of the image.
    config = files.read_json(path)
    steps = int(config.get("num_train_timesteps", 1000))
    if str(config.get("_class_name")).startswith("FlowMatch"):
        shift = float(config.get("shift", 1.0))
        if config.get("use_dynamic_shifting"):
            shift = math.exp(_shift(config, cells[0] * cells[1] // 4))
        return Flow(time_scale=steps, shift=shift), "v"
    # A DDPM is known by its betas.
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    schedule = config.get("beta_schedule", "linear")
    stated = {
        "linear": np.linspace(first, last, steps),
        "scaled_linear": np.linspace(first**0.5, last**0.5, steps) ** 2,
        "squaredcos_cap_v2": BETAS["cosine"](steps),
    }.get(schedule)
    changed = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    names = [
        name
        for name, betas in BETAS.items()
        if stated is not None and not changed and np.allclose(stated, betas(steps))
    ]
    kind = KINDS.get(config.get("prediction_type", "epsilon"))
    if not names or kind is None:
        raise ValueError(
            f"{path}: beta_schedule={schedule!r} from {first} to {last} in {steps} steps, "
            f"prediction_type={config.get('prediction_type')!r}; expected the betas of DDPM "
            f"(linear), Stable Diffusion (scaled_linear) or IDDPM (squaredcos_cap_v2), neither "
            f"trained nor rescaled, and one of {', '.join(KINDS)}"
        )
    return DDPM(cast(Any, names[0]), steps), kind


def _shift(config: dict[str, Any], tokens: int) -> float:
    """Return FLUX's mu, linear in the number of tokens."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))
