"""Encoded images on disk: shards of latents in safetensors, and the index that describes them.

A folder of latents holds ``index.json`` and shards. A shard holds, for its images in order,

    moments   (rows, flips, 2, c, h, w): mean and standard deviation of x_0, of the image and, if
              flips is 2, of its mirror image
    labels    (rows,) int64
    names     (rows,) int64, the hash of each image's name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.bounds import Bounds, Count, Natural, checked
from sag_dit.data.training_batches import Indices
from sag_dit.files import file_sha256
from sag_dit.tensors import Labels
from sag_dit.untrusted import parse_json, read_json

FORMAT = 1
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAMES_IN_FILE = {"float16": "F16", "float32": "F32"}
REMEDY = "repeat the command that encoded them to have it made again"

Moments = Float[Tensor, "b f 2 c h w"]


@dataclass(frozen=True)
class Shard:
    """One file of latents.

    Attributes:
        file: its name.
        rows: how many images it holds.
        bytes: its size.
        sha256: of the whole file.
        skipped: names of images that would be in it, had they been readable.
        shape: (c, h, w) of its x_0, None where it is the index's; images of one bucket share it.

    Example:
        >>> Shard("000.safetensors", rows=2, bytes=100, sha256="1f3a").skipped
        ()
    """

    file: Annotated[str, Bounds(pattern=r"[\w.-]+", expected="the name of a file beside it")]
    rows: Natural
    bytes: Natural
    sha256: str
    skipped: tuple[str, ...] = ()
    shape: tuple[Count, Count, Count] | None = None


@dataclass(frozen=True)
class Index:
    """What a folder of latents holds.

    Attributes:
        config: what determined the latents.
        vae: the autoencoder, as it was named, a local one by its absolute path, one of the user's
            own by the path of its class, with its arguments.
        class_names: one per class.
        shape: (c, h, w) of x_0; of buckets, that of the size at which a run draws.
        dtype: ``float16`` or ``float32``.
        flips: 2 if mirror images are there, else 1.
        counts: images of each class.
        shards: the files, in order.

    Example::

        index = read_index(folder)
        print(index.images, index.shape, index.class_names)
    """

    config: dict[str, Any]
    vae: str | dict[str, Any]
    class_names: tuple[str, ...]
    shape: tuple[Count, Count, Count]
    dtype: Literal["float16", "float32"]
    flips: Annotated[int, Bounds(least=1, most=2)]
    counts: tuple[Natural, ...]
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(shard.rows for shard in self.shards)

    def shape_of(self, shard: Shard) -> tuple[int, int, int]:
        """Return (c, h, w) of x_0 in a shard."""
        return shard.shape or self.shape

    def to_json(self) -> str:
        """Return the text of the index file."""
        return json.dumps({"format": FORMAT, "images": self.images, **asdict(self)}, indent=1)


def read_index(folder: Path) -> Index:
    """Read the index of a folder of latents.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(
            f"data.root={folder}: no {INDEX}; expected a folder that encode.py has finished, "
            f"or a zip of EDM2's latents"
        )
    # Read the index, and check that its parts agree with each other.
    try:
        values = read_json(file)
        version, images = values.pop("format", None), values.pop("images", None)
        if version != FORMAT:
            raise ValueError(f"{file}: its format is {version!r:.60}, expected {FORMAT}")
        index = checked(values, Index, str(file))
        if len(index.counts) != len(index.class_names):
            raise ValueError(
                f"{file}: {len(index.class_names)} classes, and counts of {len(index.counts)}"
            )
        if not images == index.images == sum(index.counts) > 0:
            raise ValueError(
                f"{file}: it says {images!r:.60} images, its shards {index.images}, its classes "
                f"{sum(index.counts)}"
            )
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    return index


def pack(moments: Moments, labels: Labels, names: Labels) -> bytes:
    """Return the content of a shard's file."""
    return safetensors.torch.save(
        {"moments": moments.contiguous(), "labels": labels, "names": names}
    )


class Rows(NamedTuple):
    """A shard's arrays, mapped from its file.

    Example::

        rows = map_shard(folder, index.shards[0], index)
        mean = rows.moments[0, 0, 0]  # of the first image, not mirrored
    """

    moments: NDArray[Any]
    labels: Indices
    names: Indices


def map_shard(folder: Path, shard: Shard, index: Index) -> Rows:
    """Map a shard's file into memory; nothing but its header is read.

    Raises:
        ValueError: it is missing, truncated, or not what the index says.
    """
    file = folder / shard.file
    size = file.stat().st_size if file.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"{file} {found}, expected {shard.bytes} bytes; {REMEDY}")
    # Map the file, and compare its header with what the index says before anything is viewed.
    # Not numpy's own mapping, which keeps a file open for each of perhaps thousands of shards.
    content = torch.from_file(str(file), size=size, dtype=torch.uint8)
    expected = {
        "moments": (
            NAMES_IN_FILE[index.dtype],
            [shard.rows, index.flips, 2, *index.shape_of(shard)],
        ),
        "labels": ("I64", [shard.rows]),
        "names": ("I64", [shard.rows]),
    }
    types = {"moments": DTYPES[index.dtype], "labels": torch.int64, "names": torch.int64}
    try:
        length = int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = parse_json(content[8 : 8 + length].numpy().tobytes().decode(), file)
        found_here = {name: (header[name]["dtype"], header[name]["shape"]) for name in expected}
        if found_here != expected:
            raise ValueError(f"it holds {found_here}, and the index says {expected}")
        arrays = {}
        for name, (_, shape) in expected.items():
            start, end = (8 + length + offset for offset in header[name]["data_offsets"])
            arrays[name] = content[start:end].view(types[name]).reshape(shape).numpy()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged ({error}); {REMEDY}") from None
    return Rows(**arrays)


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Compare the sha256 of shards' files with the index; four files at a time.

    Raises:
        ValueError: a file is not what was written.
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda shard: file_sha256(folder / shard.file), shards)
        for shard, digest in zip(shards, digests, strict=True):
            if digest != shard.sha256:
                raise ValueError(
                    f"{folder / shard.file}: sha256 is {digest}, expected {shard.sha256}; {REMEDY}"
                )
