"""Where a run lies, and how one goes on that an earlier version began."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sag_dit.output.claim import recorded

NOT_WEIGHTS = (
    *("out", "logger", "every_n_steps", "preview", "max_steps", "compile", "max_skipped"),
    *("track", "checkpoint_blocks", "data.workers", "trainer.enable_progress_bar"),
)
"""Keys that do not change what the weights are after a given number of steps."""

ADDED = {"ema.warmup": False, "data.balance": 0.0, "data.validation": None}
"""Keys of later versions -> the value at which everything is as it was before there was the key."""


def identity(config: DictConfig) -> dict[str, Any]:
    """Return what determines the weights, as plain values."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    without = [key for key, before in ADDED.items() if OmegaConf.select(config, key) == before]
    for key in (*NOT_WEIGHTS, *without):
        group, _, name = key.rpartition(".")
        (values[group] if group else values).pop(name, None)
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def run_folder(config: DictConfig) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights."""
    if config.out:
        return Path(config.out)

    def named(values: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return Path("outputs/train") / f"{config.name}-{digest[:8]}"

    values = identity(config)
    settings = {key: value for key, value in values["ema"].items() if key != "warmup"}
    begun = named({**values, "ema": settings})
    return begun if begun_without_warmup(begun) else named(values)


def begun_without_warmup(out: Path) -> bool:
    """Whether a folder holds a run of a version that did not know ``ema.warmup``."""
    config = recorded(out).get("config", {})
    return "ema" in config and "warmup" not in config["ema"]


def go_on_as_begun(config: DictConfig, out: Path) -> None:
    """Leave the average of weights as it was where a run goes on."""
    if begun_without_warmup(out):
        with open_dict(config.ema):
            config.ema.pop("warmup", None)
