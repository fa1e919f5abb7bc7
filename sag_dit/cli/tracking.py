"""``train.py track=fid``: what is measured of the images that are drawn during training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

from sag_dit.checkpoints import Model
from sag_dit.cli.composing import config_folder
from sag_dit.cli.instruments import Cabinet, check_metrics, example_of
from sag_dit.data.requests import make_requests
from sag_dit.sampling import Settings
from sag_dit.training.metrics import TrackMetrics, best_by


def trackers(
    track: Mapping[str, Any] | None, model: Model, out: Path, device: torch.device
) -> list[Callback]:
    """Return the callbacks that ``track`` asks for, none where it is null.

    Raises:
        ValueError: a value, features or a reference that cannot be used.
    """
    if not track:
        return []
    metrics, features, best = track["metrics"], track["features"], track["best"]
    check_metrics(metrics)
    if isinstance(features, str):
        file = config_folder() / "features" / f"{features}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
            raise ValueError(f"track.features={features}: expected one of {known}")
        features = yaml.safe_load(file.read_text())
    names = model.class_names
    instruments = Cabinet(device).instruments(
        features, track["reference"], metrics, example_of(model), names
    )
    if best and "fid" not in instruments.metrics:
        raise ValueError("track.best=true: the best checkpoint is chosen by fid; track it too")
    requests = make_requests(track["num_images"], track["seed"], None, names)
    settings = Settings.of(model, steps=track["steps"])
    settings.check(model)
    suite = instruments.suite(len(requests), 1, spread=False)
    every = track["every_n_steps"]
    callbacks: list[Callback] = [TrackMetrics(suite, requests, settings, every)]
    if best:
        callbacks.append(best_by("fid", out, every))
    return callbacks
