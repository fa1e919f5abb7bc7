"""Measuring one set of images on all ranks, drawn on the fly or read from disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from sag_dit.data.requests import PendingRequests
from sag_dit.evaluation.image_set import ImageBatch, ImageSet
from sag_dit.output.finish import write_manifest
from sag_dit.output.folder import SampleFolder, pixels, read_png, write_png
from sag_dit.sampling import Drawn, Request
from sag_dit.study.measurement import Measurement, ToDraw
from sag_dit.study.results import Record, write_record
from sag_dit.training.predicting import Predictor

READ = 64
"""Images read from disk at once."""


class _Share(IterableDataset[ImageBatch]):
    """A rank's share of a set of images."""

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int) -> None:
        self._read = partial(images.read, batch_size, rank, world)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self._read()


class Stored(LightningDataModule):
    """A rank's share of a set of images on disk."""

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
    """Sees the images of a measurement, batch by batch, and knows their numbers at the end.

    Of metrics some may be ``known``, which are not measured again. The first ``num`` images of the
    set are kept in ``shots``.

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
        if shots is not None and num:
            shots.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Drawn | ImageBatch) -> None:
        """Add a batch."""
        images, indices = (batch.images, batch.indices) if isinstance(batch, Drawn) else batch
        self._suite.update(images, indices)
        for image, index in zip(images, indices.tolist(), strict=True):
            if self._shots is not None and index < self._num:
                write_png(shot(self._shots, index), pixels(image))

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

    The first ``num`` images are kept beside them, unless there is a record already. ``text``
    stands before the bar.
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
    missing = folder.missing(images.requests, gallery=0)
    # Ranks that have started have all looked before any of them draws.
    predictor.trainer.strategy.barrier()
    if missing:
        done = len(images.requests) - len(missing)
        consumers = [folder.write]
        predictor.draw(images.model, missing, images.settings, consumers, text=text, done=done)
        # A rank reads what another one may have drawn.
        predictor.trainer.strategy.barrier()
