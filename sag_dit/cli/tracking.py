"""``train.py track=fid``: what is measured of the images that are drawn during training."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from sag_dit.checkpoints import Model
from sag_dit.cli.app import config_folder
from sag_dit.cli.instruments import Cabinet, check_metrics, example_of
from sag_dit.data.requests import make_requests
from sag_dit.sampling import Settings
from sag_dit.training.metrics import TrackMetrics, best_by


def trackers(config: DictConfig, model: Model, out: Path, device: torch.device) -> list[Callback]:
    """Return the callbacks that ``track`` asks for, none where it is null.

    Raises:
        ValueError: a value, features or a reference that cannot be used.
    """
    wanted = config.get("track")
    if not wanted:
        return []
    check_metrics(wanted.metrics)
    chosen = wanted.copy()
    if isinstance(wanted.features, str):
        file = config_folder() / "features" / f"{wanted.features}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
            raise ValueError(f"track.features={wanted.features}: expected one of {known}")
        chosen.features = OmegaConf.load(file)
    names = model.class_names
    instruments = Cabinet(device).instruments(chosen, example_of(model), names)
    if wanted.best and "fid" not in instruments.metrics:
        raise ValueError("track.best=true: the best checkpoint is chosen by fid; track it too")
    requests = make_requests(wanted.num_images, wanted.seed, None, names)
    settings = Settings.of(model, steps=wanted.steps)
    settings.check(model)
    suite = instruments.suite(len(requests), 1, spread=False)
    callbacks: list[Callback] = [TrackMetrics(suite, requests, settings, wanted.every_n_steps)]
    if wanted.best:
        callbacks.append(best_by("fid", out, wanted.every_n_steps))
    return callbacks
