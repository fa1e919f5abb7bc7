"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images of ten classes, no download.

Forty per cent are held out; the indices stand in ``digits_held_out.json`` beside this file, drawn
once, stratified by class, so that no library's random numbers can move the split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.training_batches import Batch, StepData, validation_batches
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


class _DigitImages(Dataset[tuple[Images, Labels]]):
    """Images and labels in memory, served by the batch."""

    def __init__(self, images: Images, labels: Labels) -> None:
        self._images, self._labels = images, labels

    def __getitems__(self, batch: Batch) -> tuple[Images, Labels]:
        return self._images[batch.indices], self._labels[batch.indices]


class Digits(StepData):
    """Batches of handwritten digits for training, the held-out ones for validation.

    ``batch_size`` counts the images of a step over all ranks. Which they are depends on (seed,
    step) alone. ``classes`` are the digits wanted, in the order of their labels; None means all.

    Raises:
        ValueError: ``classes`` are not different digits.

    Example::

        trainer.fit(module, Digits(batch_size=64, classes=[3, 7]))
    """

    key = "digits"
    former = ("sag_dit.data.digits.Digits",)

    channels = 1

    def __init__(
        self, batch_size: int = 64, seed: int = 0, classes: Sequence[int] | None = None
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, flip=False, workers=0)
        self.classes = tuple(range(10) if classes is None else classes)
        known = all(digit in range(10) for digit in self.classes)
        if not self.classes or not known or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={list(self.classes)}: expected different digits from 0 to 9, or null"
            )
        self.class_names = tuple(CLASS_NAMES[digit] for digit in self.classes)

    def _split(self, split: Literal["train", "held_out"]) -> tuple[Images, Labels]:
        images, labels = digits(split)
        new_labels = torch.full((10,), -1)
        new_labels[list(self.classes)] = torch.arange(len(self.classes))
        labels = new_labels[labels]
        return images[labels >= 0], labels[labels >= 0]

    @cached_property
    def dataset(self) -> _DigitImages:
        """The digits to train on, then the held-out ones."""
        parts = zip(self._split("train"), self._split("held_out"), strict=True)
        return _DigitImages(*(torch.cat(pair) for pair in parts))

    @cached_property
    def held_out_images(self) -> NDArray[np.bool_]:
        """Which digits are held out."""
        counts = [len(self._split(split)[1]) for split in ("train", "held_out")]
        return np.repeat([False, True], counts)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out digits in one order, all of them on every rank."""
        return self._loader(validation_batches(np.flatnonzero(self.held_out_images), 256))

    def check(self, model: Model) -> None:
        """Refuse a model that does not draw 8x8 grey images of as many classes.

        Raises:
            ValueError: what does not fit.
        """
        shape, classes = model.denoiser.latent_shape, model.class_conditional.num_classes
        if shape != (1, 8, 8) or classes != len(self.class_names):
            raise ValueError(
                f"a model of {shape} and {classes} classes: the digits are (1, 8, 8) and of "
                f"{len(self.class_names)} classes; set resolution=8 and num_classes=null"
            )
