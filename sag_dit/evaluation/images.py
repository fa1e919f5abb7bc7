"""Sets of uint8 images by index: a folder, an npz, a named split, tensors, any dataset."""

from __future__ import annotations

import hashlib
import math
import os
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import ImageColor
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from sag_dit.bounds import Natural
from sag_dit.checkpoints.files import sha256
from sag_dit.data.crop import (
    TRANSPARENT,
    WHITE,
    PixelArray,
    UnreadableImageError,
    check_background,
    crop_of,
    header_of,
    image_of,
)
from sag_dit.data.images import archives_of, find_images, told_left_out, told_pages
from sag_dit.data.splits import SPLITS, split
from sag_dit.evaluation.metrics import Statistics
from sag_dit.tensors import Labels
from sag_dit.untrusted import read_json_lines

ImageBatch: TypeAlias = tuple[UInt8[Tensor, "b c h w"], Labels]


class ImageSet(ABC):
    """Images in one order, each with an index of its own.

    ``protocol`` says, as plain JSON values, what was done to them before they are read. ``notes``
    are sentences to stand beside their numbers, such as which files were left out.

    Example::

        images = open_images("digits:report")
        print(len(images), images.shape, images.balance())
    """

    name: str
    protocol: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    @abstractmethod
    def labels(self) -> list[int] | None:
        """The class of every image, None if it is not known."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @property
    def indices(self) -> Sequence[int]:
        """The index of every image, in the order of the labels."""
        return range(len(self))

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


def share(count: int, rank: int, world: int) -> range:
    """Return a rank's consecutive places; how many each rank has differs by one at most."""
    return range(count * rank // world, count * (rank + 1) // world)


Source: TypeAlias = "str | Path | tuple[Tensor, Tensor] | Dataset[Any]"
"""A path, a name such as ``digits:report``, (images, labels), or a dataset of (image, label)."""


def open_images(source: Source, *, size: int | None = None, background: str = WHITE) -> ImageSet:
    """Open a set of images; ``size`` crops the images of a folder to squares as ADM does.

    ``background`` is the colour behind what is transparent in the images of a folder.

    A folder is one of ``sample.py``, whose manifest tells each image's index, or class folders, or
    any flat folder: there the order of the names does. Archives, shards and data sets on disk are
    read as :func:`sag_dit.data.images.find_images` does.

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
    if path.is_dir() or archives_of(path):
        return FolderImages(path, size, background)
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


@dataclass(frozen=True)
class ManifestRow:
    """What a line of a sample folder's ``manifest.jsonl`` says that is asked of it here.

    Example:
        >>> ManifestRow(index=3, label=7).label
        7
    """

    index: Natural
    label: Natural


class FolderImages(ImageSet):
    """Image files below a folder.

    Raises:
        ValueError: there are none, or they lie both in class folders and beside them.

    Example::

        for images, indices in FolderImages(folder).read(batch_size=64):
            suite.update(images, indices)
    """

    def __init__(self, path: Path, size: int | None = None, background: str = WHITE) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size}: expected 1 or more pixels")
        check_background(background)
        # A folder of sample.py holds its images in a folder of their own.
        self._manifest = path / "manifest.jsonl"
        sampled = self._manifest.is_file() or (path / "config.yaml").is_file()
        root = path / "images" if sampled and (path / "images").is_dir() else path
        try:
            self._files = find_images(root)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("data.root=")) from None
        self.name = path.resolve().name
        self.notes = [f"left out are {text}" for text in told_left_out(self._files.left_out)]
        self.size, self.background = size, background
        self.protocol = {"crop": None if size is None else f"ADM's centre crop to {size} pixels"}
        # The indices are the files' names where these are different numbers, else their places.
        stems = [Path(name).stem for name in self._files.names]
        # Only a manifest makes a number in a name a place: elsewhere it may be anything.
        own = all(stem.isdecimal() and int(stem) in self._sampled for stem in stems)
        self._indices = torch.tensor([int(stem) for stem in stems] if own else range(len(stems)))

    def __len__(self) -> int:
        return len(self._files)

    @property
    def indices(self) -> list[int]:
        """The files' names where these are numbers of a manifest, else their places."""
        found: list[int] = self._indices.tolist()
        return found

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
        return {row.index: row.label for row in read_json_lines(self._manifest, ManifestRow)}

    @cached_property
    def _channels(self) -> int:
        """3 where any image is in colour, whichever comes first, else 1; headers alone are read."""
        behind = ImageColor.getrgb(self.background)
        grey_behind = len(set(behind)) == 1

        def grey(place: int) -> bool:
            try:
                header = self._files.header(place)
            except (UnreadableImageError, OSError):
                return True  # It is refused by name when its turn comes.
            return header.grey and (grey_behind or header.unlike_before != TRANSPARENT)

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
        path, channels = self._files.path(place), self._channels
        try:
            content = self._files.read(place)
            if self.size is not None:
                return crop_of(content, path, self.size, channels, background=self.background)
            return image_of(content, path, channels, background=self.background)
        except UnreadableImageError as error:
            raise ValueError(f"{error}; remove it") from None

    def digest(self) -> str:
        """Return a sha256 over names and files, the crop and, where it matters, the background."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        total = hashlib.sha256(f"{self.size} {self._channels}".encode())
        unlike_before, pages = False, []
        for place, name in enumerate(self._files.names):
            path = self._files.path(place)
            content = self._files.read(place)
            total.update(os.fsencode(f"{name}\n{hashlib.sha256(content).hexdigest()}\n"))
            with suppress(UnreadableImageError):
                header = header_of(BytesIO(content), path)
                unlike_before |= bool(header.unlike_before)
                pages += [name] * header.pages
        if pages:
            self.notes = [*self.notes, told_pages(pages)]
        # Numbers of such files that were measured before are of other pixels.
        if unlike_before:
            total.update(f"over {self.background}".encode())
        return total.hexdigest()


MOST_UNPACKED = 256 << 20
"""Bytes of an image, or of an array of labels or statistics beyond twice its file."""
EXPECTED = "expected arr_0, uint8 images (n, h, w, 1 or 3), as sample.py writes with npz=true"


@dataclass(frozen=True)
class NpzStatistics:
    """Statistics that stand in an npz, and whether its images do.

    Example::

        given = read_statistics("VIRTUAL_imagenet256_labeled.npz")
    """

    pool: Statistics
    spatial: Statistics | None
    has_images: bool


def read_statistics(file: str | Path) -> NpzStatistics | None:
    """Read ``mu``, ``sigma``, ``mu_s`` and ``sigma_s``; None if it is no npz or has no ``mu``.

    Raises:
        ValueError: the arrays are no mean and covariance.
    """
    path = Path(file).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        return None
    with _archive(path) as archive:
        names = {Path(name).stem for name in archive.namelist()}
        if not names >= {"mu", "sigma"}:
            return None
        spatial = names >= {"mu_s", "sigma_s"}
        return NpzStatistics(
            _statistics(path, archive, "mu", "sigma"),
            _statistics(path, archive, "mu_s", "sigma_s") if spatial else None,
            "arr_0" in names,
        )


def _statistics(path: Path, archive: zipfile.ZipFile, mu: str, sigma: str) -> Statistics:
    mean, covariance = (_array(path, archive, name) for name in (mu, sigma))
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{path}: {mu} {mean.shape} and {sigma} {covariance.shape}: expected a mean (d) and a "
            f"covariance (d, d)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mu} or {sigma} holds NaN or infinity; download it again")
    return Statistics(
        None,
        torch.from_numpy(mean.astype(np.float64)),
        torch.from_numpy(covariance.astype(np.float64)),
    )


class NpzImages(ImageSet):
    """``arr_0`` of an npz, read batch by batch; ``arr_1`` holds labels where it is there.

    Raises:
        ValueError: it is no npz of images.

    Example::

        for images, indices in NpzImages(file).read(batch_size=64):
            suite.update(images, indices)
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.protocol = {"crop": None}
        with self._pixels() as (_, shape):
            self._shape = shape

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, height, width, channels = self._shape
        return channels, height, width

    @cached_property
    def labels(self) -> list[int] | None:
        """The class of every image."""
        with _archive(self.path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return None
            labels = _array(self.path, archive, "arr_1")
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: arr_1 is {labels.dtype} {labels.shape}; expected {len(self)} labels"
            )
        listed: list[int] = labels.tolist()
        return listed

    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices).

        Raises:
            ValueError: the file is cut short.
        """
        own = share(len(self), rank, world)
        size = int(np.prod(self._shape[1:]))
        with self._pixels() as (stream, _):
            stream.seek(own.start * size, 1)
            for start in range(own.start, own.stop, batch_size):
                stop = min(start + batch_size, own.stop)
                content = stream.read((stop - start) * size)
                if len(content) < (stop - start) * size:
                    raise ValueError(f"{self.path}: cut short at image {start}; copy it again")
                images = np.frombuffer(bytearray(content), dtype=np.uint8)
                images = images.reshape(stop - start, *self._shape[1:]).transpose(0, 3, 1, 2)
                yield torch.from_numpy(np.ascontiguousarray(images)), torch.arange(start, stop)

    @contextmanager
    def _pixels(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        """Give the stream of arr_0 at its first pixel, and its shape."""
        with _archive(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{self.path} holds {archive.namelist()}; {EXPECTED}")
            with archive.open("arr_0.npy") as stream:
                try:
                    shape, fortran, dtype = _npy_header(stream)
                except ValueError as error:
                    raise ValueError(f"{self.path}: arr_0: {error}; {EXPECTED}") from None
                images = len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0
                if not images or fortran or dtype != np.uint8:
                    raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}; {EXPECTED}")
                size = archive.getinfo("arr_0.npy").file_size
                if math.prod(shape) > size or math.prod(shape[1:]) > MOST_UNPACKED:
                    raise ValueError(
                        f"{self.path}: arr_0 says it is {shape} and has {size:,} bytes: cut short, "
                        f"or images too large; {EXPECTED}"
                    )
                yield stream, shape

    def digest(self) -> str:
        """Return the file's sha256."""
        return sha256([self.path])


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or no npz ({error}); {EXPECTED}") from None


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    try:
        # Sizes first: an entry may unpack to a thousand times the file, and a header say anything.
        size = archive.getinfo(f"{name}.npy").file_size
        if size > 2 * path.stat().st_size + MOST_UNPACKED:
            raise ValueError(f"it unpacks to {size / 1e6:,.0f} MB")
        content = archive.read(f"{name}.npy")
        shape, _, dtype = _npy_header(BytesIO(content))
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"it says {dtype} {shape} and has {size} bytes")
        return np.lib.format.read_array(BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {name} cannot be read ({error})") from None


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape, order and type that an array's header says, which is read.

    Raises:
        ValueError: there is none, or of a version that numpy's savez does not write.
    """
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of npy: expected 1.0 or 2.0")
    try:
        return read(stream)
    except (SyntaxError, TypeError, tokenize.TokenError, RecursionError) as error:
        raise ValueError(f"no header of an array ({error})") from None
