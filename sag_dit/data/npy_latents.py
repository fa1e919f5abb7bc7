"""Latents as NVlabs/edm2's ``dataset_tool.py encode`` writes them: a .npy file for each image.

Each holds the mean and behind it the standard deviation of z, float32 (2 c, h, w), as the encoder
put them out; ``dataset.json`` beside them has the labels. They lie in a zip or in a folder.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sag_dit.checkpoints.edm2 import EDM2Autoencoder
from sag_dit.data.archives import Archives
from sag_dit.data.images import archives_of
from sag_dit.data.labels import DATASET_JSON, LABELS_SIZE, Mark, numbered, read_labels
from sag_dit.data.shards import INDEX, Index
from sag_dit.data.training_batches import Batch, Indices, name_hash
from sag_dit.messages import readable
from sag_dit.tensors import Labels
from sag_dit.untrusted import TARGET, read_text

ENDING = ".npy"
VAE: Mapping[str, Any] = {TARGET: f"sag_dit.checkpoints.{EDM2Autoencoder.__name__}"}
"""The autoencoder that they are from unless another one is stated."""


def holds_npy(root: Path) -> bool:
    """Whether a root is an archive, or a folder of .npy files that ``encode.py`` did not write."""
    if root.is_dir() and not (root / INDEX).exists():
        return any(name.endswith(ENDING) for _, _, names in os.walk(root) for name in names)
    return root.is_file() and bool(archives_of(root))


def array_of(content: bytes) -> NDArray[Any]:
    """Return the array of numbers in the content of a .npy file, as a view of it.

    Raises:
        ValueError: it is damaged, or holds objects.

    Example:
        >>> stream = io.BytesIO()
        >>> np.save(stream, np.ones((2, 3)))
        >>> array_of(stream.getvalue()).shape
        (2, 3)
    """
    stream = io.BytesIO(content)
    first = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("objects in place of numbers")
    # Never more memory than the file has bytes, whatever its header says.
    values = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if by_columns else "C")


class NpyLatents(Dataset[Any]):
    """Mean and standard deviation of z by index, read from a zip or folder of .npy files.

    Raises:
        ValueError: there are none, the labels do not name them all, or the first is no such array.

    Example::

        latents = NpyLatents(Path("img512-sd.zip"))
        moments, label, step = latents[0]  # moments: (2, 4, 64, 64)
    """

    buckets: Sequence[tuple[int, int]] = ()
    bucket_of: Indices | None = None
    """All have one size."""

    def __init__(self, root: Path) -> None:
        self.folder = root
        self._archive = None if root.is_dir() else Archives(root, archives_of(root))
        if self._archive is None:
            found = (Path(at) / name for at, _, names in os.walk(root) for name in names)
            listed = [each.relative_to(root).as_posix() for each in found]
        else:
            listed = self._archive.names
        # EDM2 takes them in the order of their names.
        self.files = sorted(name for name in listed if name.endswith(ENDING))
        if not self.files:
            raise ValueError(
                f"data.root={root}: no {ENDING} file in it: expected latents of encode.py, or of "
                f"dataset_tool.py of EDM2"
            )
        marks = self._marks(DATASET_JSON in listed)
        self.labels, names = numbered(
            [marks[name] for name in self.files], self.files, None, str(root)
        )
        self.names: Indices = np.array([name_hash(name) for name in self.files], dtype=np.int64)
        self._shape: tuple[int, ...] = ()
        self._shape = self._read(0).shape
        self.index = Index(
            config={},
            vae=dict(VAE),
            class_names=names,
            shape=(self._shape[0] // 2, self._shape[1], self._shape[2]),
            dtype="float32",
            flips=1,
            counts=tuple(np.bincount(self.labels, minlength=len(names)).tolist()),
            shards=(),
        )

    def _marks(self, labelled: bool) -> Mapping[str, Mark]:
        """Return the class of each file; all are of one where nothing tells.

        Raises:
            ValueError: the labels cannot be read, or do not name each file.
        """
        found = None
        if labelled:
            where = str(self.folder / DATASET_JSON)
            if self._archive is None:
                text = read_text(self.folder / DATASET_JSON, LABELS_SIZE)
            else:
                text = self._archive.read(DATASET_JSON).decode("utf-8-sig", "replace")
            found = read_labels(text, where)
        if found is None:
            return dict.fromkeys(self.files, 0)
        missing = [name for name in self.files if name not in found]
        if missing:
            raise ValueError(
                f"{where} lacks {len(missing):,} of {len(self.files):,} files, the first is "
                f"{readable(missing[0])}: expected a label for each; mend it, or encode anew"
            )
        return found

    def _read(self, index: int) -> NDArray[np.float32]:
        """Return what a file holds, (2 c, h, w).

        Raises:
            ValueError: it is damaged, or not of the shape of the first.
        """
        name = self.files[index]
        where = self.folder / name
        try:
            archive = self._archive
            content = where.read_bytes() if archive is None else archive.read(name)
            array = array_of(content)
        except Exception as error:  # numpy's reader of headers raises almost any type
            told = " ".join(str(error).split())[:200]
            raise ValueError(f"{where} cannot be read ({told}); copy or encode it again") from None
        expected = self._shape or (8, 64, 64)
        fits = array.ndim == 3 and 0 not in array.shape and array.shape[0] % 2 == 0
        fits &= array.dtype == np.float32
        if not fits or (self._shape and array.shape != self._shape):
            raise ValueError(
                f"{where} holds {array.dtype} {array.shape}: expected mean and standard deviation "
                f"of latents, such as float32 {tuple(expected)}"
            )
        return array

    def __len__(self) -> int:
        return len(self.files)

    def named(self, index: int) -> str:
        """Return where an image's file lies."""
        return readable(str(self.folder / self.files[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        moments, labels, step = self.__getitems__(Batch(0, [index], [False]))
        return moments[0], labels[0], step

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Labels, int]:
        arrays = np.stack([self._read(index) for index in batch.indices])
        moments = torch.from_numpy(arrays).unflatten(1, (2, -1))
        return moments, torch.from_numpy(self.labels[batch.indices]), batch.step

    def listing_sha256(self) -> str:
        """Return a sha256 of the files' names, sizes in bytes, and labels."""
        listing = hashlib.sha256()
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            size = (
                (self.folder / name).stat().st_size
                if self._archive is None
                else self._archive.stamp(name)
            )
            listing.update(os.fsencode(f"{name} {size} {label}\n"))
        return listing.hexdigest()
