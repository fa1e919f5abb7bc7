"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images of ten classes, no download.

Forty per cent are held out; the indices stand in ``digits_held_out.json`` beside this file, drawn
once, stratified by class, so that no library's random numbers can move the split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sag_dit.checkpoints import Model
from sag_dit.data.batches import StepBatches
from sag_dit.tensors import Images, Labels

CLASS_NAMES = tuple(str(digit) for digit in range(10))


@cache
def digits(split: Literal["train", "held_out"]) -> tuple[Images, Labels]:
    """Return the images (b, 1, 8, 8), uint8 in 0..255, and labels of one split.

    The original has 17 grey levels, 0 to 16; level k becomes round(255 k / 16).
    """
    # Imported here because only the digits need it and it takes a second.
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[json.loads(files(__package__).joinpath("digits_held_out.json").read_text())] = True
    chosen = held_out if split == "held_out" else ~held_out
    return images[chosen], labels[chosen]


class Digits(LightningDataModule):
    """Batches of handwritten digits for training, the held-out ones for validation.

    ``batch_size`` counts the images of a step over all ranks. Which they are depends on (seed,
    step) alone. ``classes`` are the digits wanted, in the order of their labels; None means all.

    Raises:
        ValueError: ``classes`` are not different digits.
    """

    channels = 1
    vae = None

    def __init__(
        self, batch_size: int = 64, seed: int = 0, classes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.classes = tuple(range(10) if classes is None else classes)
        known = all(digit in range(10) for digit in self.classes)
        if not self.classes or not known or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={list(self.classes)}: expected different digits from 0 to 9, or null"
            )
        self.class_names = tuple(CLASS_NAMES[digit] for digit in self.classes)

    def _split(self, split: Literal["train", "held_out"]) -> tuple[Images, Labels]:
        images, labels = digits(split)
        if self.classes == tuple(range(10)):
            return images, labels
        new_labels = torch.full((10,), -1)
        new_labels[list(self.classes)] = torch.arange(len(self.classes))
        labels = new_labels[labels]
        return images[labels >= 0], labels[labels >= 0]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return endless training batches, going on at the trainer's step."""
        trainer = self.trainer
        world = trainer.world_size if trainer else 1
        if self.batch_size % world:
            raise ValueError(
                f"batch_size={self.batch_size} on {world} ranks: expected a multiple of {world}"
            )
        first = trainer.fit_loop.total_batch_idx + 1 if trainer else 0
        images, labels = self._split("train")
        dataset: Dataset[tuple[Tensor, ...]] = TensorDataset(images, labels)
        batches = StepBatches(
            len(labels),
            self.batch_size // world,
            self.seed,
            first=first,
            rank=trainer.global_rank if trainer else 0,
            world=world,
        )
        return DataLoader(dataset, batch_sampler=batches)

    def check(self, model: Model) -> None:
        """Refuse a model that does not draw 8x8 grey images of as many classes.

        Raises:
            ValueError: what does not fit.
        """
        shape, classes = model.denoiser.latent_shape, model.denoiser.num_classes
        if shape != (1, 8, 8) or classes != len(self.class_names):
            raise ValueError(
                f"a model of {shape} and {classes} classes: the digits are (1, 8, 8) and of "
                f"{len(self.class_names)} classes; set resolution=8 and num_classes=null"
            )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out digits in one order."""
        return DataLoader(TensorDataset(*self._split("held_out")), batch_size=256)
