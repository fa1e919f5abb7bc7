"""Measuring one set of images on all ranks, drawn on the fly or read from disk, by Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sag_dit.evaluation.image_set import ImageSet
from sag_dit.evaluation.suite import Suite
from sag_dit.output.folder import SampleFolder, read_png, write_png
from sag_dit.output.writer import Drawn, PredictionWriter, pixels
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Request
from sag_dit.training.module import DiffusionModule

Batch = tuple[Tensor, Tensor]
"""Images (b, c, h, w), uint8, and their indices (b)."""


class Keeping(DiffusionModule):
    """Draws what its folder lacks, keeps it there, and reads the rest."""

    def __init__(self, folder: SampleFolder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder = folder
        self._writer = PredictionWriter(folder)

    def predict_step(self, batch: Sequence[Request], batch_idx: int) -> Drawn:
        """Return a batch of which perhaps all, perhaps nothing, had to be drawn."""
        missing = [each for each in batch if not self._folder.image(each.index).exists()]
        if missing:
            self._writer.write(super().predict_step(missing, batch_idx))
        read = [torch.tensor(read_png(self._folder.image(each.index))) for each in batch]
        return Drawn(batch, torch.stack(read).permute(0, 3, 1, 2))


class Reading(LightningModule):
    """Hands batches of images from disk on."""

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return the batch."""
        return batch


class _Share(IterableDataset[Batch]):
    """A rank's share of a set of images."""

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int) -> None:
        self._read = partial(images.read, batch_size, rank, world)

    def __iter__(self) -> Iterator[Batch]:
        return self._read()


class Stored(LightningDataModule):
    """A rank's share of a set of images on disk."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's batches as they are."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        share = _Share(self.images, self.batch_size, rank, world)
        return DataLoader(share, batch_size=None)


class Measure(Callback):
    """Gives every batch to a suite, and keeps the first ``num`` images of the set in a folder."""

    def __init__(self) -> None:
        self._suite: Suite | None = None
        self._shots, self._num = Path(), 0

    def begin(self, suite: Suite, shots: Path, num: int) -> None:
        """Measure another set from now on."""
        self._suite, self._shots, self._num = suite, shots, num
        suite.reset()
        if num:
            shots.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        if self._suite is None:
            raise RuntimeError("begin() has to be called before a set is measured")
        if isinstance(outputs, Drawn):
            images = outputs.images
            indices = torch.tensor([request.index for request in outputs.requests])
        else:
            images, indices = outputs
        self._suite.update(images, indices)
        for image, index in zip(images, indices.tolist(), strict=True):
            if index < self._num:
                write_png(shot(self._shots, index), pixels(image))


def shot(folder: Path, index: int) -> Path:
    """Return the file of one of the images that a setting is shown by."""
    return folder / f"{index:06d}.png"


class Bar(Callback):
    """Shows on rank 0 which set is measured, and how many of its images.

    Ranks have equal shares, so that rank 0's own count tells for all.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._rows = self._done = self._total = 0
        self._text = ""

    def begin(self, text: str, total: int) -> None:
        """Start the bar of another set."""
        self._text, self._total, self._done = text, total, 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if trainer.is_global_zero:
            self._task = self._progress.add_task(self._text, total=self._total)
            self._progress.start()

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note how many images the next batch gives on all ranks."""
        drawn = isinstance(pl_module, DiffusionModule)
        self._rows = len(batch if drawn else batch[0]) * trainer.world_size

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move to what is done."""
        self._done = min(self._total, self._done + self._rows)
        if self._task is not None:
            self._progress.update(self._task, completed=self._done)

    def watch(self, step: SampleStep) -> None:
        """Move by one step of rank 0's batch."""
        if self._task is not None:
            place = self._done + self._rows * (step.step.index + 1) / step.step.count
            self._progress.update(self._task, completed=min(self._total, int(place)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar down."""
        self.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the bar down, so that the error stands alone."""
        self.stop()

    def stop(self) -> None:
        """Take the bar down."""
        if self._task is not None:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task = None
