"""Measuring one set of images on all ranks, drawn on the fly or read from disk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from sag_dit.evaluation.image_set import ImageBatch, ImageSet
from sag_dit.evaluation.suite import Suite
from sag_dit.output.folder import SampleFolder, pixels, read_png, write_png
from sag_dit.sampling import Drawn, Request


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


class Measure:
    """Gives every batch to a suite, and keeps the first ``num`` images of the set in a folder."""

    def __init__(self, suite: Suite, shots: Path, num: int) -> None:
        self._suite, self._shots, self._num = suite, shots, num
        if num:
            shots.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Drawn | ImageBatch) -> None:
        """Add a batch."""
        images, indices = (batch.images, batch.indices) if isinstance(batch, Drawn) else batch
        self._suite.update(images, indices)
        for image, index in zip(images, indices.tolist(), strict=True):
            if index < self._num:
                write_png(shot(self._shots, index), pixels(image))


def shot(folder: Path, index: int) -> Path:
    """Return the file of one of the images that a setting is shown by."""
    return folder / f"{index:06d}.png"
