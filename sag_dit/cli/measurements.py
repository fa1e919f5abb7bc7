"""Measurements as configured: models, features and references loaded, and every row checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sag_dit.checkpoints import Model
from sag_dit.cli.composing import make
from sag_dit.cli.keys import Evaluate
from sag_dit.cli.keys.key import selected, to_dict
from sag_dit.cli.published import expected_of, otherwise
from sag_dit.cli.rows import Configured
from sag_dit.cli.sample import Plan, make_plan
from sag_dit.cli.schema import determining
from sag_dit.cli.typed import choices
from sag_dit.cli.values import MEASURED, as_callable
from sag_dit.evaluation.features import FeatureExtractor
from sag_dit.evaluation.images import ImageSet, open_images
from sag_dit.evaluation.scores import Verifier
from sag_dit.guidance import Cost
from sag_dit.study.charts import text_of
from sag_dit.study.comparison import check_trainings
from sag_dit.study.measurement import Measurement, Setting, ToDraw, guidance_text, measurement
from sag_dit.study.setup import Ratio, Setup, Setups, example_of


class Loaded:
    """What has been loaded on a device, to be used again by further measurements.

    Example::

        loaded = Loaded(device)
        make_measurements(rows, device, loaded)
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.setups = device, Setups(device)
        self.networks: dict[str, FeatureExtractor] = {}
        self.models: dict[str, Model] = {}
        self.sets: dict[str, ImageSet] = {}
        self.verifiers: dict[str, Verifier] = {}


def make_measurements(
    rows: Sequence[Configured], device: torch.device, loaded: Loaded | None = None
) -> list[Measurement]:
    """Load models, features and references, each once, and check that they fit.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    loaded = loaded or Loaded(device)
    costs: dict[int, Cost] = {}
    prepared: list[tuple[ToDraw | ImageSet, Setup]] = []
    # Each set of images, and what it is measured with.
    for row in rows:
        config = row.config
        images: ToDraw | ImageSet
        if row.source is None:
            plan = _plan(config, loaded.models)
            how = plan.settings
            if row.place not in costs:  # A seed costs what another does.
                costs[row.place] = how.cost(plan.model.denoiser)
            folder = plan.folder if config.keep else None
            cost = costs[row.place]
            images = ToDraw(plan.model, how, plan.requests, plan.pixels, cost, folder)
            example, names = example_of(plan.model), plan.model.class_names
        else:
            images = loaded.sets.setdefault(f"{row.source} over {config.background}", _opened(row))
            example, names = next(images.read(1))[0][:1], ()
        setup = loaded.setups.setup(
            example,
            names,
            features=make_features(config.features, loaded.networks),
            reference=config.reference,
            background=config.background,
            metrics=config.metrics,
            fdr=Ratio(config.fdr.features or (), config.fdr.split),
            verifiers=make_verifiers(config.verifiers, loaded.verifiers),
        )
        prepared.append((images, setup))
    # Numbers of one setting are put together, so that its models have to be trainings of one.
    trainings: dict[int, dict[str, Model]] = {}
    for row, (images, _) in zip(rows, prepared, strict=True):
        if isinstance(images, ToDraw):
            trainings.setdefault(row.place, {})[str(row.config.ckpt)] = images.model
    for models in trainings.values():
        check_trainings([*models.values()])
    # Names follow from what distinguishes the rows, and are known once all of them are.
    guidance = [
        each.pixels["guidance"] if isinstance(each, ToDraw) else None for each, _ in prepared
    ]
    settings: dict[int, Setting] = {}
    for row, name in zip(rows, name_rows(rows, guidance), strict=True):
        if row.place not in settings:
            expected = expected_of(row.config)
            told = otherwise(row.config, expected) if expected else ()
            settings[row.place] = Setting(name, row.name, row.axes, expected, told)
    return [
        measurement(settings[row.place], *parts, row.config.confidence.repeats)
        for row, parts in zip(rows, prepared, strict=True)
    ]


def _plan(config: Evaluate, models: dict[str, Model]) -> Plan:
    # Settings that agree in what decides on the model share it.
    values = to_dict(config)
    key = repr([selected(values, name) for name in determining("evaluate", "model")])
    # Kept images go where sample.py would draw them.
    plan = make_plan(config, config.num_images or MEASURED, None, models.get(key))
    # The model's own classes: another row may be without the classifier that brought its own.
    models[key] = replace(plan.model, class_names=plan.model.denoiser.class_names)
    return plan


def _opened(row: Configured) -> ImageSet:
    if row.config.num_images is not None:
        raise ValueError(
            f"num_images={row.config.num_images}: all images of samples={row.source} are measured; "
            f"leave it out"
        )
    try:
        return open_images(row.source or "", background=row.config.background)
    except ValueError as error:
        raise ValueError(f"samples: {error}") from error


def make_features(node: Any, networks: dict[str, FeatureExtractor]) -> FeatureExtractor | None:
    """Return the configured network, made once; None where the images choose it.

    Raises:
        ValueError: it is no network of features, or its weights are not here.
    """
    if not node:
        return None
    if not isinstance(node, dict) or "_target_" not in node:
        raise ValueError(
            f"features={node}: expected {', '.join(choices('features'))}, or a mapping with "
            f"_target_, the class of a FeatureExtractor"
        )
    key = repr(node)
    if key not in networks:
        networks[key] = make(node, "features", FeatureExtractor)
    return networks[key]


def make_verifiers(
    nodes: Mapping[str, Any] | None, made: dict[str, Verifier]
) -> dict[str, Verifier]:
    """Return the configured verifiers by their names, each made once.

    Raises:
        ValueError: it is none that can be called, or its weights are not here.
    """
    found = {}
    for name, node in (nodes or {}).items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise ValueError(
                f"verifiers.{name}={node}: expected a mapping with _target_, a function of "
                f"(images, condition) or a class whose objects are called so"
            )
        key = repr(node)
        if key not in made:
            where = f"verifiers.{name}"
            made[key] = make(as_callable(node, where), where)
        found[name] = made[key]
    return found


def name_rows(
    rows: Sequence[Configured], guidance: Sequence[Mapping[str, Any] | None]
) -> list[str]:
    """Return what each row is called: its guidance and what else distinguishes it.

    ``guidance`` holds each row's active terms by name, None for images on disk.
    """
    names = []
    for row, terms in zip(rows, guidance, strict=True):
        if row.title:
            names.append(row.title)
            continue
        parts = [] if terms is None else [guidance_text(terms) or "unguided"]
        parts += [
            f"{key} {text_of(value)}"
            for key, value in row.axes.items()
            if terms is None or not key.endswith("_scale")
        ]
        names.append(", ".join(parts) or row.name)
    # A comparison may vary what the guidance does not show.
    places = {
        name: {row.place for row, own in zip(rows, names, strict=True) if own == name}
        for name in names
    }
    return [
        f"{row.name}: {name}" if len(places[name]) > 1 and row.name else name
        for row, name in zip(rows, names, strict=True)
    ]
