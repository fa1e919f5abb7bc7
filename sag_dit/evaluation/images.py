"""Sets of uint8 images by index: a folder, an npz, a named split, tensors or any dataset."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from sag_dit.data.crop import MODES, PixelArray, read_crop
from sag_dit.data.folder import find_images
from sag_dit.data.splits import SPLITS, split
from sag_dit.tensors import Labels

Source: TypeAlias = "str | Path | tuple[Tensor, Tensor] | Dataset[Any]"
"""A path, a name such as ``digits:report``, (images, labels), or a dataset of (image, label)."""
ImageBatch: TypeAlias = tuple[UInt8[Tensor, "b c h w"], Labels]

GREY = {"1", "L", "LA", "I;16"}


class ImageSet(ABC):
    """Images in one order, each with an index of its own.

    ``protocol`` says, as plain JSON values, what was done to them before they are read.
    """

    name: str
    protocol: Mapping[str, Any]

    @property
    @abstractmethod
    def labels(self) -> list[int] | None:
        """The class of every image, None if nobody told."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many images there are."""

    @abstractmethod
    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices) of one rank's share, consecutive images, in their order."""

    @abstractmethod
    def digest(self) -> str:
        """Return a sha256 over all that is read."""

    def balance(self) -> dict[str, int] | None:
        """Return how many classes there are, and how many images the smallest and largest have."""
        if self.labels is None:
            return None
        counts = Counter(self.labels).values()
        return {"classes": len(counts), "fewest": min(counts), "most": max(counts)}


def open_images(source: Source, *, size: int | None = None) -> ImageSet:
    """Open a set of images; ``size`` crops the images of a folder to squares as ADM does.

    A folder is one of ``sample.py``, class folders, or any flat folder. Where all names in a flat
    folder are numbers they are the indices.

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
        return DatasetImages(TensorDataset(*split(text)), text)
    if path.is_dir():
        return FolderImages(path, size)
    if path.is_file() and path.suffix == ".npz":
        # Imported here because that module knows this one.
        from sag_dit.evaluation.npz import NpzImages

        return NpzImages(path)
    found = "no such file or folder" if not path.exists() else "a file that is not an npz"
    raise ValueError(
        f"{text!r}: {found}; expected a folder of images, an .npz with arr_0, or one of "
        f"{', '.join(SPLITS)}"
    )


def read_images(
    source: Source, batch_size: int, *, size: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[ImageBatch]:
    """Yield (uint8 images (b, c, h, w), indices (b)) of a source, of one rank's share of it.

    Raises:
        ValueError: the source is not readable; a file that is to blame is named.
    """
    yield from open_images(source, size=size).read(batch_size, rank, world)


def share(count: int, rank: int, world: int) -> range:
    """Return the places of one rank's consecutive images; they differ by one in number at most."""
    return range(count * rank // world, count * (rank + 1) // world)


class FolderImages(ImageSet):
    """Image files below a folder.

    Raises:
        ValueError: there are none, or they lie both in class folders and beside them.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size}: expected 1 or more pixels")
        self._manifest = path / "manifest.jsonl"
        sampled = self._manifest.is_file() or (path / "config.yaml").is_file()
        root = path / "images" if sampled and (path / "images").is_dir() else path
        try:
            self._files = find_images(root)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("data.root=")) from None
        self.name = path.resolve().name
        self.size = size
        self.protocol = {"crop": None if size is None else f"ADM's centre crop to {size} pixels"}
        stems = [Path(name).stem for name in self._files.names]
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        by_name = len(set(numbers)) == len(stems) and len(self._files.class_names) == 1
        self._indices = torch.tensor(numbers if by_name else range(len(stems)))

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def labels(self) -> list[int] | None:
        """The class folders, or what the manifest of a sample folder says."""
        if len(self._files.class_names) > 1:
            labels: list[int] = self._files.labels.tolist()
            return labels
        if not self._manifest.is_file():
            return None
        rows = [json.loads(row) for row in self._manifest.read_text(encoding="utf-8").splitlines()]
        known = {int(row["index"]): int(row["label"]) for row in rows}
        indices = self._indices.tolist()
        return [known[i] for i in indices] if known.keys() >= set(indices) else None

    @cached_property
    def _channels(self) -> int:
        with Image.open(self._files.path(0)) as image:
            return 1 if image.mode in GREY else 3

    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices); files are decoded by several threads.

        Raises:
            ValueError: a file cannot be decoded, or images differ in size or in colour.
        """
        own = share(len(self), rank, world)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(own.start, own.stop, batch_size):
                places = range(start, min(start + batch_size, own.stop))
                pixels = list(pool.map(self._pixels, places))
                _, *first = self.shape
                for place, array in zip(places, pixels, strict=True):
                    _, *found = array.shape
                    if found != first:
                        raise ValueError(
                            f"{self._files.path(place)} has {found[1]} x {found[0]} pixels, others "
                            f"have {first[1]} x {first[0]}; expected one size, or set size to crop "
                            f"all to squares"
                        )
                yield torch.from_numpy(np.stack(pixels)), self._indices[places.start : places.stop]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first image."""
        channels, height, width = self._pixels(0).shape
        return channels, height, width

    def _pixels(self, place: int) -> PixelArray:
        path = self._files.path(place)
        if self.size is not None:
            return read_crop(path, self.size, self._channels)
        try:
            with Image.open(path) as image:
                if self._channels == 1 and image.mode not in GREY:
                    raise ValueError(
                        f"{path} is in colour but the first image, {self._files.names[0]}, is "
                        f"grey: expected either"
                    )
                turned = ImageOps.exif_transpose(image).convert(MODES[self._channels])
        except OSError as error:
            raise ValueError(f"{path} cannot be decoded ({error}); remove it") from None
        pixels = np.asarray(turned).reshape(turned.height, turned.width, self._channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def digest(self) -> str:
        """Return a sha256 over names and files, and the crop."""
        total = hashlib.sha256(f"{self.size} {self._channels}".encode())
        for place, name in enumerate(self._files.names):
            content = self._files.path(place).read_bytes()
            total.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
        return total.hexdigest()


class DatasetImages(ImageSet):
    """A map-style dataset of (image (c, h, w) uint8, label)."""

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
