"""``train.py track=fid``: what is measured of the images that are drawn during training."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback

from sag_dit.checkpoints import Model
from sag_dit.cli.keys import Track
from sag_dit.cli.measurements import make_features
from sag_dit.data.requests import make_requests
from sag_dit.evaluation.features import FeatureExtractor, feature_networks
from sag_dit.sampling import Settings
from sag_dit.study.setup import Setups, check_metrics, example_of
from sag_dit.training.callbacks import TrackMetrics, best_by


def trackers(
    track: Track | None, model: Model, out: Path, device: torch.device, at_previews: int
) -> list[Callback]:
    """Return the callbacks that ``track`` asks for, none where it is null.

    ``at_previews`` are the steps between previews, at which it measures unless it says otherwise.

    Raises:
        ValueError: a value, features or a reference that cannot be used.
    """
    if not track:
        return []
    metrics, best, every = track.metrics, track.best, track.every_n_steps or at_previews
    try:
        check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"track.{error}") from error
    features: FeatureExtractor | str | None = None
    if not isinstance(track.features, str):
        features = make_features(track.features, {})
    elif track.features in feature_networks():
        features = track.features
    elif track.features != "auto":
        raise ValueError(
            f"track.features={track.features}: expected one of auto, "
            f"{', '.join(feature_networks())}"
        )
    # What the images are measured with, as evaluate.py chooses it.
    names = model.class_names
    setup = Setups(device).setup(
        example_of(model),
        names,
        features=features,
        reference=track.reference,
        metrics=metrics,
    )
    if best and "fid" not in setup.metrics:
        raise ValueError("track.best=true: the best checkpoint is chosen by fid; track it too")
    requests = make_requests(track.num_images, track.seed, None, names)
    settings = Settings.of(model, steps=track.steps)
    settings.check(model)
    suite = setup.suite(len(requests), 1, spread=False)
    callbacks: list[Callback] = [TrackMetrics(suite, requests, settings, every)]
    if best:
        callbacks.append(best_by("fid", out, every))
    return callbacks
