"""Fluent Emoji 3D by Microsoft: 3,391 emoji of 64 x 64 pixels on white, in 31 classes, no download.

``emoji.zip`` beside this file holds one AVIF sheet and a table: code points, Unicode's name, class,
family and split of every image; ``benchmarks/emoji_data.py`` made it. A family is one emoji in all
its skin tones and genders. Eight families of ten are to train on, one is to choose settings with
(``tune``) and one to report them (``report``); they were drawn once, class by class, and no family
stands on two sides. Licences: ``emoji_license.txt`` beside this file.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.training_batches import (
    Batch,
    Indices,
    StepData,
    balanced,
    validation_batches,
)
from sag_dit.tensors import Images, Labels

SIZE = 64
COLUMNS = 59
"""Images in a row of the sheet, which is about square."""

FILE = Path(__file__).with_name("emoji.zip")

NOT_MIRRORED = ("clock", "sign", "button", "flag")
"""Classes whose mirror images are wrong: they hold letters, digits, arrows and coats of arms."""

Split = Literal["train", "tune", "report", "held_out"]


@dataclass(frozen=True)
class Emoji:
    """The table of all emoji, one entry per image in the order of Unicode's list.

    Attributes:
        class_names: one per class.
        codes: code points in hexadecimal digits, joined with hyphens.
        names: Unicode's names.
        families: what all tones and genders of an emoji have in common.
        labels: the class of each.
        splits: ``train``, ``tune`` or ``report``.
        images: (n, 3, 64, 64), uint8.

    Example::

        table = all_emoji()
        chosen = table.images[table.places("train")]
    """

    class_names: tuple[str, ...]
    codes: tuple[str, ...]
    names: tuple[str, ...]
    families: tuple[str, ...]
    labels: Indices
    splits: NDArray[np.str_]
    images: NDArray[np.uint8]

    def places(self, split: Split) -> Indices:
        """Return which images belong to a split; ``held_out`` is tune and report."""
        chosen = self.splits != "train" if split == "held_out" else self.splits == split
        return np.flatnonzero(chosen)


@cache
def all_emoji() -> Emoji:
    """Read the bundled file; this takes about a second.

    Raises:
        ValueError: the installed Pillow cannot read AVIF.
    """
    with zipfile.ZipFile(FILE) as file:
        table, packed = json.loads(file.read("emoji.json")), file.read("emoji.avif")
    try:
        sheet = np.asarray(Image.open(BytesIO(packed)).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(
            "data=emoji: the installed Pillow cannot read AVIF; pip install 'pillow>=11.3'"
        ) from None
    tiles = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 3).transpose(0, 2, 4, 1, 3)
    images = np.ascontiguousarray(tiles.reshape(-1, 3, SIZE, SIZE)[: len(table["code"])])
    return Emoji(
        class_names=tuple(table["classes"]),
        codes=tuple(table["code"]),
        names=tuple(table["name"]),
        families=tuple(table["family"]),
        labels=np.array(table["label"], dtype=np.int64),
        splits=np.array(table["split"]),
        images=images,
    )


def emoji(split: Split) -> tuple[Images, Labels]:
    """Return the images (b, 3, 64, 64), uint8, and labels of a split."""
    table = all_emoji()
    places = table.places(split)
    return torch.from_numpy(table.images[places]), torch.from_numpy(table.labels[places])


def mirrorable(labels: Indices) -> NDArray[np.bool_]:
    """Return which images may be mirrored, by their classes."""
    names = all_emoji().class_names
    return ~np.isin(labels, [names.index(name) for name in NOT_MIRRORED])


def write_images(root: Path, split: Split, limit: int | None = None) -> None:
    """Write a split as PNG files, a folder per class, to be encoded: ``encode.py data.root=...``.

    Beside every image that may be mirrored stands its mirror image, as a file of its own: encoding
    all mirror images (``flip=true``) would train on mirrored digits and flags. ``limit`` takes the
    first so many images of each class.
    """
    table = all_emoji()
    written = [0] * len(table.class_names)
    for place in table.places(split):
        label = table.labels[place]
        written[label] += 1
        if limit is not None and written[label] > limit:
            continue
        folder = root / table.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = table.images[place].transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{table.codes[place]}.png")
        if mirrorable(label):
            mirrored = Image.fromarray(np.ascontiguousarray(pixels[:, ::-1]))
            mirrored.save(folder / f"{table.codes[place]}-mirrored.png")


class _EmojiImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, mirrored where the batch says so and the class allows it."""

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        table = all_emoji()
        images, labels = table.images[batch.indices], table.labels[batch.indices]
        mirrored = np.array(batch.mirrored) & mirrorable(labels)
        images[mirrored] = images[mirrored][..., ::-1]
        return torch.from_numpy(images), torch.from_numpy(labels)


class EmojiData(StepData):
    """Batches (uint8 emoji (b, 3, 64, 64), classes), those to tune with for validation.

    An epoch shows every image to train on r times, where r = round((n_max / n)^balance) for a class
    of n images of which the largest has n_max: with ``balance=0`` every image once, with 1 every
    class about equally often. All people come in six skin tones and would else be half of what is
    seen. ``flip`` mirrors half of the images, but no flags, clocks, signs and buttons.

    Raises:
        ValueError: Pillow cannot read the bundled file, or a value is out of its range.

    Example::

        trainer.fit(module, EmojiData(batch_size=64))
    """

    key = "emoji"

    channels = 3

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        *,
        balance: float = 0.5,
        flip: bool = True,
        workers: int | None = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, flip=flip, workers=workers)
        self.class_names, self.balance = all_emoji().class_names, balance

    @property
    def dataset(self) -> _EmojiImages:
        """All emoji; those to report are never asked for."""
        return _EmojiImages()

    @cached_property
    def held_out_images(self) -> NDArray[np.bool_]:
        """Which emoji are not to train on."""
        held_out: NDArray[np.bool_] = all_emoji().splits != "train"
        return held_out

    @cached_property
    def training_images(self) -> Indices:
        """The images of an epoch, those of small classes repeated."""
        return balanced(super().training_images, all_emoji().labels, self.balance)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the emoji to tune with in one order, all of them on every rank."""
        return self._loader(validation_batches(all_emoji().places("tune"), 256))

    def check(self, model: Model) -> None:
        """Refuse a model that does not draw 64x64 colour images of as many classes.

        Raises:
            ValueError: what does not fit.
        """
        channels, height, width = model.denoiser.latent_shape
        factor = model.codec.factor
        if (height * factor, width * factor) != (SIZE, SIZE) or (factor == 1 and channels != 3):
            raise ValueError(
                f"a model of {channels} channels and {height * factor} x {width * factor} pixels: "
                f"the emoji are 64 x 64 in colour; set resolution=64"
            )
        self.check_classes(model)
