"""Setting, Measurement and Measuring: what is compared, each set of images, and its numbers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sag_dit import __version__
from sag_dit.checkpoints import Model
from sag_dit.checkpoints.zoo import vae_repository
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.evaluation.expected import Expected
from sag_dit.evaluation.images import ImageBatch, ImageSet
from sag_dit.evaluation.suite import class_by_class
from sag_dit.guidance import Cost
from sag_dit.identity import LATER, hashed, settings
from sag_dit.output.folder import SampleFolder, pixels, read_png, write_manifest, write_png
from sag_dit.profiling import part
from sag_dit.sampling import Drawn, Request, Settings
from sag_dit.study.results import Record, Value, identity_of, write_record
from sag_dit.study.setup import NEIGHBOUR, SPLIT_SIZE, Setup
from sag_dit.training.pending import PendingRequests
from sag_dit.training.predicting import Predictor
from sag_dit.untrusted import TARGET


@dataclass(frozen=True)
class Protocol:
    """What images are measured with.

    A field that is added has to be marked ``LATER``; see :mod:`sag_dit.identity`.

    Example::

        print(settings(protocol)["reference_statistics_sha256"])
    """

    features: str
    features_protocol: Mapping[str, Any]
    reference: str
    reference_protocol: Mapping[str, Any]
    reference_statistics_sha256: str
    k: int
    split_size: int
    fdr: Sequence[Mapping[str, Any]] | None = field(default=None, metadata=LATER)
    verifiers: Mapping[str, Any] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True)
class Confidence:
    """How the standard error behind ± is estimated.

    A field that is added has to be marked ``LATER``; see :mod:`sag_dit.identity`.

    Example:
        >>> settings(Confidence(repeats=20))
        {'repeats': 20}
    """

    repeats: int


@dataclass(frozen=True, eq=False)
class Setting:
    """One row of the table: a way to draw, or a set of images on disk.

    ``name`` is its name in the table, and ``key`` another name by which ``against`` finds it.
    ``axes`` holds the keys that a sweep changes, with the values they have here. ``expected`` are
    published numbers to show beside it, and ``otherwise`` lists where its settings differ from the
    published ones.

    Example:
        >>> Setting("SAG 0.5", axes={"sag_scale": 0.5}).axes["sag_scale"]
        0.5
    """

    name: str
    key: str = ""
    axes: Mapping[str, Value] = field(default_factory=dict)
    expected: Expected | None = None
    otherwise: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class ToDraw:
    """A set of images to draw; ``pixels`` is its identity: all that determines its pixels.

    With a ``folder`` the images are kept there, and only those that it lacks are drawn.

    Example::

        plan = ToDraw(model, how, requests, pixels, cost_of(model.denoiser, terms, DDIM(), 50))
        measured = measurement(Setting("SAG 0.5"), plan, setup, repeats=0)
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

    ``facts`` are written beside its numbers, and ``identity`` is the name of its record. The class
    of an image repeats every ``period`` indices. ± is estimated from ``repeats`` random halves of
    the images.

    Example::

        measured = measurement(Setting("photos"), open_images("photos/"), setup, repeats=20)
        print(measured.count, measured.identity, measured.notes)
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

    @property
    def notes(self) -> list[str]:
        """What makes the numbers of these images less than comparable, a sentence each."""
        if isinstance(self.images, ToDraw):
            notes, labels = [], [request.label for request in self.images.requests]
        else:
            notes, labels = list(self.images.notes), self.images.labels or []
        # Splits of the Inception Score are images in a row.
        if "is" in self.setup.metrics and self.count > SPLIT_SIZE and class_by_class(labels):
            notes.append(
                f"is: the images come class by class, so a split of {SPLIT_SIZE:,} in a row has "
                f"only some of the classes; the same images in a mixed order score higher"
            )
        return [f"{self.setting.name}: {note}" for note in notes]

    @property
    def kept_in(self) -> Path | None:
        """The folder that drawn images are kept in, if they are."""
        folder = self.images.folder if isinstance(self.images, ToDraw) else None
        return None if folder is None else folder.path

    def lacking(self, record: Record | None) -> tuple[str, ...]:
        """Return the metrics that are still to be measured."""
        known = record.metrics if record else {}
        return tuple(name for name in self.setup.metrics if name not in known)


def measurement(
    setting: Setting, images: ToDraw | ImageSet, setup: Setup, repeats: int
) -> Measurement:
    """Return a set of images with the facts that are known before it is measured.

    Raises:
        ValueError: too few images for a metric.
    """
    if isinstance(images, ToDraw):
        facts, determining, period = _facts_drawn(images)
    else:
        facts, determining, period = _facts_on_disk(images)
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
            **setup.told(),
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


def _autoencoder(vae: str | Mapping[str, Any]) -> str:
    return str(vae[TARGET]) if isinstance(vae, Mapping) else Path(vae_repository(vae)).name


def _facts_drawn(plan: ToDraw) -> tuple[dict[str, Any], dict[str, Any], int]:
    labels = [request.label for request in plan.requests]
    counts = Counter(labels).values()
    # Under the names that numbers have been kept and shown with.
    pixels, vae = hashed(plan.pixels), plan.model.vae
    rule = pixels["request"].get("classes", "as in the file of requests")
    facts: dict[str, Any] = {
        "count": len(labels),
        "model": plan.model.name,
        "weights_sha256": plan.model.sha256,
        "vae": None if vae is None else _autoencoder(vae),
        "sampler": pixels["sampler"]["name"],
        "sampler_options": {k: each for k, each in pixels["sampler"].items() if k != "name"},
        "steps": pixels["steps"],
        "guidance": guidance_text(pixels["guidance"]) or "none",
        "terms": dict(pixels["guidance"]),
        "seed": pixels["request"].get("seed"),
        "classes": rule,
        "sample_labels": {"classes": len(counts), "fewest": min(counts), "most": max(counts)},
        "trainer_precision": pixels["precision"],
        "batch_size": pixels["batch_size"],
        **{key: pixels[key] for key in ("matmul", "compile") if key in pixels},
        **({} if plan.settings.search is None else {"search": str(plan.settings.search)}),
    }
    in_turn = "requests_sha256" not in pixels["request"] and rule != "random"
    period = (len(rule) if isinstance(rule, list) else len(counts)) if in_turn else 1
    return facts, {"pixels": pixels, "count": len(labels)}, period


def _facts_on_disk(images: ImageSet) -> tuple[dict[str, Any], dict[str, Any], int]:
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
        every = term.get("every", 1)
        texts.append(text + _interval_text(term) + f" every {every} steps" * (every > 1))
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


READ = 64
"""Images read from disk at once."""


class _Share(IterableDataset[ImageBatch]):
    """A rank's share of a set of images."""

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int) -> None:
        self._read = partial(images.read, batch_size, rank, world)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self._read()


class Stored(LightningDataModule):
    """A rank's share of a set of images on disk.

    Example::

        images = open_images("photos/")
        predictor.read(Stored(images, 64), [measuring], text="photos", total=len(images))
    """

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """Return this rank's batches as they are."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        share = _Share(self.images, self.batch_size, rank, world)
        return DataLoader(share, batch_size=None)


def read_back(folder: SampleFolder, requests: list[Request]) -> Drawn:
    """Return a batch of images that a folder holds."""
    read = [torch.tensor(read_png(folder.image(each.index))) for each in requests]
    return Drawn(requests, torch.stack(read).permute(0, 3, 1, 2))


class Measuring:
    """Takes the images of a measurement batch by batch, and returns their numbers at the end.

    Metrics that the record ``known`` holds are not measured again. The first ``num`` images of the
    set are kept in the folder ``shots``.

    Example::

        measuring = Measuring(measurement, "cpu")
        for batch in drawn(model, requests, settings):
            measuring(batch)
        measuring.record().metrics
    """

    def __init__(
        self,
        measurement: Measurement,
        device: torch.device | str,
        known: Record | None = None,
        shots: Path | None = None,
        num: int = 0,
    ) -> None:
        self._since = time.monotonic()
        self._measurement, self._known, self._shots, self._num = measurement, known, shots, num
        lacking = replace(measurement.setup, metrics=measurement.lacking(known))
        spread = measurement.repeats > 0
        self._suite = lacking.suite(measurement.count, measurement.period, spread).to(device)
        # What each image was drawn from is looked up where a verifier may ask.
        images = measurement.images
        self._labels: Mapping[int, int] = {}
        if not measurement.setup.verifiers:
            pass
        elif isinstance(images, ToDraw):
            self._labels = {each.index: each.label for each in images.requests}
        elif images.labels:
            self._labels = dict(zip(images.indices, images.labels, strict=True))
        if shots is not None and num:
            shots.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Drawn | ImageBatch) -> None:
        """Add a batch."""
        images, indices = (batch.images, batch.indices) if isinstance(batch, Drawn) else batch
        with part("measure"):
            self._suite.update(images, indices, self._condition(indices))
        for image, index in zip(images, indices.tolist(), strict=True):
            if self._shots is not None and index < self._num:
                write_png(shot(self._shots, index), pixels(image))

    def _condition(self, indices: Tensor) -> Any:
        """Return what images were drawn from: class numbers or prompts; None if not known."""
        labels = [self._labels[index] for index in indices.tolist()] if self._labels else None
        images = self._measurement.images
        if (
            labels
            and isinstance(images, ToDraw)
            and isinstance(images.model.denoiser, TextConditional)
        ):
            return [images.model.class_names[label] for label in labels]
        return None if labels is None else torch.tensor(labels)

    def record(self) -> Record:
        """Return the numbers of all ranks' images; every rank has to call this."""
        # Every rank takes part in these, in this order.
        metrics = self._suite.compute()
        warnings = self._suite.warnings()
        spread = self._spread(warnings)
        facts = dict(self._measurement.facts)
        record = Record(metrics, spread, facts, warnings, time.monotonic() - self._since)
        return self._known.completed(record) if self._known else record

    def _spread(self, warnings: list[str]) -> dict[str, float]:
        repeats = self._measurement.repeats
        if not repeats:
            return {}
        if self._suite.groups == 1:
            warnings.append("no ± can be told of so few images")
            return {}
        try:
            told = self._suite.confidence(repeats)
        except ValueError as error:
            warnings.append(f"no ± could be told: {error}")
            return {}
        return {name: spread for name, (_, spread) in told.items()}


def shot(folder: Path, index: int) -> Path:
    """Return the file of one of the images that a setting is shown by."""
    return folder / f"{index:06d}.png"


def measure(
    predictor: Predictor,
    measurement: Measurement,
    finished: Path,
    *,
    text: str,
    known: Record | None = None,
    num: int = 0,
) -> Record:
    """Draw or read a set of images on all ranks, and keep its numbers in ``finished``.

    The first ``num`` images are kept beside them, unless there is a record already. ``text`` is
    written before the progress bar.
    """
    trainer, images = predictor.trainer, measurement.images
    shots = finished / measurement.identity
    device = trainer.strategy.root_device
    measuring = Measuring(measurement, device, known, shots, 0 if known else num)
    # All ranks show their images to the measurement: read, drawn, or drawn before and read back.
    if not isinstance(images, ToDraw):
        predictor.read(Stored(images, READ), [measuring], text=text, total=measurement.count)
    elif images.folder is None:
        predictor.draw(images.model, images.requests, images.settings, [measuring], text=text)
    else:
        _keep(predictor, images, images.folder, text)
        predictor.read(
            PendingRequests(images.requests, images.settings.batch_size),
            [measuring],
            text=text,
            total=measurement.count,
            read=partial(read_back, images.folder),
        )
    # The numbers are those of all ranks; one of them writes.
    record = measuring.record()
    if trainer.is_global_zero:
        if isinstance(images, ToDraw) and images.folder is not None:
            write_manifest(images.folder, images.requests, images.model.class_names)
        write_record(finished, measurement.identity, record)
    return record


def _keep(predictor: Predictor, images: ToDraw, folder: SampleFolder, text: str) -> None:
    """Draw what a folder lacks, as sample.py does."""
    tell = print if predictor.trainer.is_global_zero else None
    missing = folder.missing(images.requests, gallery=0, tell=tell)
    # Ranks that have started have all looked before any of them draws.
    predictor.trainer.strategy.barrier()
    if missing:
        done = len(images.requests) - len(missing)
        write = folder.write
        predictor.draw(images.model, missing, images.settings, write=write, text=text, done=done)
        # A rank reads what another one may have drawn.
        predictor.trainer.strategy.barrier()
