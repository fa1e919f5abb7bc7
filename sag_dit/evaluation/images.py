"""Opening a set of uint8 images by index: a folder, an npz, a named split, tensors, any dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from sag_dit.data.splits import SPLITS, read_split
from sag_dit.evaluation.image_folder import FolderImages
from sag_dit.evaluation.image_set import ImageBatch, ImageSet, share
from sag_dit.evaluation.npz import NpzImages

Source: TypeAlias = "str | Path | tuple[Tensor, Tensor] | Dataset[Any]"
"""A path, a name such as ``digits:report``, (images, labels), or a dataset of (image, label)."""


def open_images(source: Source, *, size: int | None = None) -> ImageSet:
    """Open a set of images; ``size`` crops the images of a folder to squares as ADM does.

    A folder is one of ``sample.py``, whose manifest tells each image's index, or class folders, or
    any flat folder: there the order of the names does.

    Raises:
        ValueError: the source is no such set.
    """
    if isinstance(source, tuple):
        images, labels = source
        return DatasetImages(TensorDataset(images, labels), "images in memory")
    if isinstance(source, Dataset):
        return DatasetImages(source, type(source).__name__)
    text, path = str(source), Path(source).expanduser()
    if text in SPLITS:
        return DatasetImages(TensorDataset(*read_split(text)), text)
    if path.is_dir():
        return FolderImages(path, size)
    if path.is_file() and path.suffix == ".npz":
        return NpzImages(path)
    found = "no such file or folder" if not path.exists() else "a file that is not an npz"
    raise ValueError(
        f"{text!r}: {found}; expected a folder of images, an .npz with arr_0, or one of "
        f"{', '.join(SPLITS)}"
    )


class DatasetImages(ImageSet):
    """A map-style dataset of (image (c, h, w) uint8, label).

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> DatasetImages(TensorDataset(pixels, torch.arange(4)), "black").shape
        (3, 8, 8)
    """

    def __init__(self, dataset: Dataset[Any], name: str) -> None:
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise ValueError(f"{name}: expected a dataset with a length, of at least one image")
        self._dataset, self._count, self.name = dataset, len(dataset), name
        self.protocol = {"crop": None}

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> list[int]:
        """The class of every image."""
        return self._scanned[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first image."""
        channels, height, width = self._item(0)[0].shape
        return channels, height, width

    @cached_property
    def _scanned(self) -> tuple[str, list[int]]:
        total, labels = hashlib.sha256(), []
        for place in range(len(self)):
            image, label = self._item(place)
            total.update(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes())
            labels.append(label)
        return total.hexdigest(), labels

    def _item(self, place: int) -> tuple[Tensor, int]:
        image, label = self._dataset[place]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else image
            raise ValueError(f"{self.name}: image {place} is {what}; expected uint8 (c, h, w)")
        return image, int(label)

    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices)."""
        own = share(len(self), rank, world)
        for start in range(own.start, own.stop, batch_size):
            places = range(start, min(start + batch_size, own.stop))
            yield torch.stack([self._item(i)[0] for i in places]), torch.tensor(places)

    def digest(self) -> str:
        """Return a sha256 over pixels and shapes."""
        return self._scanned[0]
