"""Jobs of an evaluation: every row checked, with all facts, before anything is drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sag_dit import __version__
from sag_dit.checkpoints import Model
from sag_dit.checkpoints.zoo import vae_repository
from sag_dit.cli.instruments import NEIGHBOUR, SPLIT_SIZE, Cabinet, Instruments, example_of
from sag_dit.cli.keys.evaluating import Evaluate
from sag_dit.cli.keys.key import plain, selected
from sag_dit.cli.records import Record, identity_of
from sag_dit.cli.rows import Row, guidance_text, name_rows
from sag_dit.cli.sample import Plan, make_plan
from sag_dit.cli.schema import determining
from sag_dit.cli.values import MEASURED
from sag_dit.evaluation.image_set import ImageSet
from sag_dit.evaluation.images import open_images
from sag_dit.guidance import Cost, cost_of
from sag_dit.identity import hashed, settings


@dataclass(frozen=True)
class Protocol:
    """What images are measured with; what is added to it has to be ``LATER``."""

    features: str
    features_protocol: Mapping[str, Any]
    reference: str
    reference_protocol: Mapping[str, Any]
    reference_statistics_sha256: str
    k: int
    split_size: int


@dataclass(frozen=True)
class Confidence:
    """How ± is told; what is added to it has to be ``LATER``."""

    repeats: int


@dataclass(frozen=True, eq=False)
class Job:
    """A row with what it takes to measure it: a plan to draw, or images on disk."""

    row: Row
    name: str
    plan: Plan | None
    images: ImageSet | None
    cost: Cost | None
    instruments: Instruments
    facts: Mapping[str, Any]
    period: int
    identity: str

    @property
    def count(self) -> int:
        """How many images are measured."""
        return self.facts["count"]  # type: ignore[no-any-return]

    def lacking(self, record: Record | None) -> tuple[str, ...]:
        """Return the metrics that are still to be measured."""
        known = record.metrics if record else {}
        return tuple(name for name in self.instruments.metrics if name not in known)


def make_jobs(rows: Sequence[Row], device: torch.device) -> list[Job]:
    """Load models, features and references, each once, and check that they fit.

    Raises:
        ValueError: a value that cannot be used; the remedy is named.
    """
    cabinet = Cabinet(device)
    models: dict[str, Model] = {}
    sets: dict[str, ImageSet] = {}
    costs: dict[int, Cost] = {}
    prepared = []
    for row in rows:
        plan, images = None, None
        if row.source is None:
            plan = _plan(row.config, models)
            if row.place not in costs:  # A seed costs what another does.
                how = plan.settings
                costs[row.place] = cost_of(
                    plan.model.denoiser, how.guidance, how.sampler, how.steps
                )
            example, names = example_of(plan.model), plan.model.class_names
        else:
            images = sets.setdefault(row.source, _opened(row))
            example, names = next(images.read(1))[0][:1], ()
        config = row.config
        instruments = cabinet.instruments(
            config.features, config.reference, config.metrics, example, names
        )
        prepared.append((row, plan, images, costs.get(row.place), instruments))
    guidance = [None if plan is None else plan.pixels["guidance"] for _, plan, *_ in prepared]
    names_of_rows = name_rows(rows, guidance)
    return [_job(name, *parts) for name, parts in zip(names_of_rows, prepared, strict=True)]


def base_name(jobs: Sequence[Job], against: str | None) -> str | None:
    """Return the name of the setting that others are compared with; None for the first.

    ``against`` is its name in the table or its key in ``compare``.

    Raises:
        ValueError: there is no such setting, or one seed alone, so that nothing is compared.
    """
    if against is None:
        return None
    if max(Counter(job.row.place for job in jobs).values()) == 1:
        raise ValueError(
            f"against={against}: with one seed nothing is told of changes; add seeds=3 or leave "
            f"it out"
        )
    known = {job.row.name: job.name for job in jobs} | {job.name: job.name for job in jobs}
    if against not in known:
        names = ", ".join(repr(name) for name in known if name)
        raise ValueError(f"against={against}: expected the name of a setting, one of {names}")
    return known[against]


def _plan(config: Evaluate, models: dict[str, Model]) -> Plan:
    # Settings that agree in what decides on the model share it.
    values = plain(config)
    key = repr([selected(values, name) for name in determining("evaluate", "model")])
    # Kept images go where sample.py would draw them.
    plan = make_plan(config, config.num_images or MEASURED, None, models.get(key))
    # The model's own classes: another row may be without the classifier that brought its own.
    models[key] = replace(plan.model, class_names=plan.model.denoiser.class_names)
    return plan


def _opened(row: Row) -> ImageSet:
    if row.config.num_images is not None:
        raise ValueError(
            f"num_images={row.config.num_images}: all images of samples={row.source} are measured; "
            f"leave it out"
        )
    try:
        return open_images(row.source or "")
    except ValueError as error:
        raise ValueError(f"samples: {error}") from error


def _job(
    name: str,
    row: Row,
    plan: Plan | None,
    images: ImageSet | None,
    cost: Cost | None,
    instruments: Instruments,
) -> Job:
    if plan is not None:
        facts, determining, period = _drawn(row.config, plan)
    elif images is not None:
        facts, determining, period = _stored(images)
    else:
        raise TypeError("a row is drawn or on disk")
    _refuse_few(facts["count"], instruments.metrics)
    reference = _plain(instruments.reference.protocol)
    measure = settings(
        Protocol(
            features=instruments.extractor.name,
            features_protocol=reference.pop("network"),
            reference=reference.pop("reference"),
            reference_protocol=reference,
            reference_statistics_sha256=instruments.reference_sha256,
            k=NEIGHBOUR,
            split_size=SPLIT_SIZE,
        )
    )
    identity = identity_of(
        {
            **determining,
            "measure": measure,
            "confidence": settings(Confidence(row.config.confidence.repeats)),
        },
        instruments.metrics,
    )
    if cost is not None:
        facts["cost"] = cost.plain()
    facts |= measure | {"sag_dit": __version__, "torch": torch.__version__}
    return Job(row, name, plan, images, cost, instruments, facts, period, identity)


def _refuse_few(count: int, metrics: Sequence[str]) -> None:
    """Refuse, before anything is drawn, precision and recall of images without k neighbours."""
    without = [name for name in metrics if name not in ("precision", "recall")]
    if count <= NEIGHBOUR and len(without) < len(metrics):
        remedy = f", or leave both out: metrics=[{','.join(without)}]" if without else ""
        raise ValueError(
            f"{count} images: precision and recall look at k={NEIGHBOUR} neighbours, so they need "
            f"more than {NEIGHBOUR}; take more images{remedy}"
        )


def _drawn(config: Evaluate, plan: Plan) -> tuple[dict[str, Any], dict[str, Any], int]:
    labels = [request.label for request in plan.requests]
    counts = Counter(labels).values()
    # Under the names that numbers have been kept and shown with.
    pixels, vae = hashed(plan.pixels), plan.model.vae
    rule = pixels["request"].get("classes", "as in the file of requests")
    facts = {
        "count": len(labels),
        "model": plan.model.name,
        "weights_sha256": plan.model.sha256,
        "vae": None if vae is None else Path(vae_repository(vae)).name,
        "sampler": pixels["sampler"]["name"],
        "steps": pixels["steps"],
        "guidance": guidance_text(pixels["guidance"]) or "none",
        "terms": dict(pixels["guidance"]),
        "seed": pixels["request"].get("seed"),
        "classes": rule,
        "sample_labels": {"classes": len(counts), "fewest": min(counts), "most": max(counts)},
        "trainer_precision": pixels["precision"],
        "batch_size": pixels["batch_size"],
    }
    in_turn = config.requests is None and rule != "random"
    period = (len(rule) if isinstance(rule, list) else len(counts)) if in_turn else 1
    return facts, {"pixels": pixels, "count": len(labels)}, period


def _stored(images: ImageSet) -> tuple[dict[str, Any], dict[str, Any], int]:
    labels, digest = images.labels, images.digest()
    facts = {
        "count": len(images),
        "samples": images.name,
        "samples_sha256": digest,
        "sample_labels": images.balance(),
    }
    return facts, {"samples_sha256": digest, "count": len(images)}, _period(labels)


def _period(labels: Sequence[int] | None) -> int:
    """Return the distance at which classes recur, 1 if they do not."""
    if not labels or labels[0] not in labels[1:]:
        return 1
    period = labels.index(labels[0], 1)
    recurs = all(label == labels[place % period] for place, label in enumerate(labels))
    return period if recurs else 1


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain
