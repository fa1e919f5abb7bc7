"""Reading npz files: ADM's references and samples, without unpickling or holding the images."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from sag_dit.checkpoints.files import sha256
from sag_dit.evaluation.image_set import ImageBatch, ImageSet, share
from sag_dit.evaluation.statistics import Statistics

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
                version = np.lib.format.read_magic(stream)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                shape, fortran, dtype = header(stream) if header else ((), True, None)
                images = len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0
                if not images or fortran or dtype != np.uint8:
                    raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}; {EXPECTED}")
                yield stream, shape

    def digest(self) -> str:
        """Return the file's sha256."""
        return sha256([self.path])


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or no npz ({error}); {EXPECTED}") from None


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    try:
        return np.lib.format.read_array(BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {name} cannot be read ({error})") from None
