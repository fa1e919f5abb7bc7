"""Image files below a folder as a set: one of ``sample.py``, class folders, or a flat one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from sag_dit.data.images import MODES, PixelArray, find_images, read_crop
from sag_dit.evaluation.image_set import ImageBatch, ImageSet, share

GREY = {"1", "L", "LA", "I;16"}


class FolderImages(ImageSet):
    """Image files below a folder.

    Raises:
        ValueError: there are none, or they lie both in class folders and beside them.

    Example::

        for images, indices in FolderImages(folder).read(batch_size=64):
            suite.update(images, indices)
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size}: expected 1 or more pixels")
        # A folder of sample.py holds its images in a folder of their own.
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
        # The indices are the files' names where these are different numbers, else their places.
        stems = [Path(name).stem for name in self._files.names]
        # Only a manifest makes a number in a name a place: elsewhere it may be anything.
        own = all(stem.isdecimal() and int(stem) in self._sampled for stem in stems)
        self._indices = torch.tensor([int(stem) for stem in stems] if own else range(len(stems)))

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def labels(self) -> list[int] | None:
        """The class folders, or what the manifest of a sample folder says."""
        if len(self._files.class_names) > 1:
            labels: list[int] = self._files.labels.tolist()
            return labels
        indices = self._indices.tolist()
        return [self._sampled[i] for i in indices] if self._sampled.keys() >= set(indices) else None

    @cached_property
    def _sampled(self) -> dict[int, int]:
        """The class of every image by its index, as a sample folder's manifest says."""
        if not self._manifest.is_file():
            return {}
        rows = [json.loads(row) for row in self._manifest.read_text(encoding="utf-8").splitlines()]
        return {int(row["index"]): int(row["label"]) for row in rows}

    @cached_property
    def _channels(self) -> int:
        """3 where any image is in colour, whichever comes first, else 1; headers alone are read."""

        def grey(place: int) -> bool:
            try:
                with Image.open(self._files.path(place)) as image:
                    return image.mode in GREY
            except OSError:
                return True  # It is refused by name when its turn comes.

        return 1 if all(map(grey, range(len(self)))) else 3

    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices); files are decoded by several threads.

        Raises:
            ValueError: a file cannot be decoded, or images differ in size.
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
