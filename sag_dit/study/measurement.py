"""Setting and Measurement: what is compared, and each set of images with all facts about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sag_dit import __version__
from sag_dit.checkpoints import Model
from sag_dit.checkpoints.zoo import vae_repository
from sag_dit.evaluation.expected import Expected
from sag_dit.evaluation.image_set import ImageSet
from sag_dit.guidance import Cost
from sag_dit.identity import hashed, settings
from sag_dit.output.folder import SampleFolder
from sag_dit.sampling import Request, Settings
from sag_dit.study.results import Record, Value, identity_of
from sag_dit.study.setup import NEIGHBOUR, SPLIT_SIZE, Setup


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
class Setting:
    """One row of the table: a way to draw, or a set of images on disk.

    ``name`` is what the table calls it and ``key`` what else it goes by; ``axes`` is what
    distinguishes it in a sweep. ``expected`` are published numbers to show beside it, and
    ``otherwise`` says in what its settings differ from the published ones.
    """

    name: str
    key: str = ""
    axes: Mapping[str, Value] = field(default_factory=dict)
    expected: Expected | None = None
    otherwise: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class ToDraw:
    """A set of images that is drawn; ``pixels``, an identity, says all that determines it.

    With a ``folder`` the images are kept there, and only those that it lacks are drawn.
    """

    model: Model
    settings: Settings
    requests: Sequence[Request]
    pixels: Mapping[str, Any]
    cost: Cost
    folder: SampleFolder | None = None


@dataclass(frozen=True, eq=False)
class Measurement:
    """A set of images of a setting, at one seed, with what it is measured with.

    ``facts`` stand beside its numbers. ``identity`` names its record. Classes recur over the
    indices with ``period``. ``repeats`` random halves of the images tell what stands behind ±.
    """

    setting: Setting
    images: ToDraw | ImageSet
    setup: Setup
    facts: Mapping[str, Any]
    period: int
    identity: str
    repeats: int

    @property
    def count(self) -> int:
        """How many images are measured."""
        return self.facts["count"]  # type: ignore[no-any-return]

    def lacking(self, record: Record | None) -> tuple[str, ...]:
        """Return the metrics that are still to be measured."""
        known = record.metrics if record else {}
        return tuple(name for name in self.setup.metrics if name not in known)


def measurement(
    setting: Setting, images: ToDraw | ImageSet, setup: Setup, repeats: int
) -> Measurement:
    """Put together what is known of a set of images before it is measured.

    Raises:
        ValueError: too few images for a metric.
    """
    if isinstance(images, ToDraw):
        facts, determining, period = _drawn(images)
    else:
        facts, determining, period = _stored(images)
    _refuse_few(facts["count"], setup.metrics)
    reference = _plain(setup.reference.protocol)
    measure = settings(
        Protocol(
            features=setup.extractor.name,
            features_protocol=reference.pop("network"),
            reference=reference.pop("reference"),
            reference_protocol=reference,
            reference_statistics_sha256=setup.reference_sha256,
            k=NEIGHBOUR,
            split_size=SPLIT_SIZE,
        )
    )
    told = {"measure": measure, "confidence": settings(Confidence(repeats))}
    identity = identity_of({**determining, **told}, setup.metrics)
    if isinstance(images, ToDraw):
        facts["cost"] = images.cost.plain()
    facts |= measure | {"sag_dit": __version__, "torch": torch.__version__}
    return Measurement(setting, images, setup, facts, period, identity, repeats)


def base_name(measurements: Sequence[Measurement], against: str | None) -> str | None:
    """Return the name of the setting that others are compared with; None for the first.

    ``against`` is its name in the table or its key.

    Raises:
        ValueError: there is no such setting, or one seed alone, so that nothing is compared.
    """
    if against is None:
        return None
    settings = [each.setting for each in measurements]
    if max(Counter(settings).values()) == 1:
        raise ValueError(
            f"against={against}: with one seed nothing is told of changes; add seeds=3 or leave "
            f"it out"
        )
    known = {each.key: each.name for each in settings} | {each.name: each.name for each in settings}
    if against not in known:
        names = ", ".join(repr(name) for name in known if name)
        raise ValueError(f"against={against}: expected the name of a setting, one of {names}")
    return known[against]


def _refuse_few(count: int, metrics: Sequence[str]) -> None:
    """Refuse, before anything is drawn, precision and recall of images without k neighbours."""
    without = [name for name in metrics if name not in ("precision", "recall")]
    if count <= NEIGHBOUR and len(without) < len(metrics):
        remedy = f", or leave both out: metrics=[{','.join(without)}]" if without else ""
        raise ValueError(
            f"{count} images: precision and recall look at k={NEIGHBOUR} neighbours, so they need "
            f"more than {NEIGHBOUR}; take more images{remedy}"
        )


def _drawn(plan: ToDraw) -> tuple[dict[str, Any], dict[str, Any], int]:
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
    in_turn = "requests_sha256" not in pixels["request"] and rule != "random"
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


def guidance_text(guidance: Mapping[str, Mapping[str, Any]]) -> str:
    """Return active terms as one reads them, ``CFG 1.5 + SAG 0.5``; nothing without any."""
    texts = []
    for name, term in guidance.items():
        text = name.upper() if len(name) <= 3 else name
        if "scale" in term:
            text += f" {term['scale']:g}"
        if term.get("channels") is not None:
            text += f" on {term['channels']} channels"
        texts.append(text + _interval_text(term))
    return " + ".join(texts)


def _interval_text(term: Mapping[str, Any]) -> str:
    """Return where a term acts, nothing where it does throughout."""
    start, stop = term.get("interval", (0.0, 1.0))
    unit = term.get("interval_in", "progress")
    if unit == "progress":
        return "" if (start, stop) == (0.0, 1.0) else f" from {start:g} to {stop:g}"
    sides = "" if start is None else f" from {start:g}"
    sides += "" if stop is None else f" to {stop:g}" if sides else f" up to {stop:g}"
    return f"{sides} in {unit}" if sides else ""
