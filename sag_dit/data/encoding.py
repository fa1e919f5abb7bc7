"""Encoding a folder of images to latents: what is written, what is missing, one rank's share."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sag_dit.codec import Pixels, VAECodec
from sag_dit.data.images import Crops, latent_size
from sag_dit.data.shards import (
    DTYPES,
    INDEX,
    Index,
    Shard,
    map_shard,
    pack,
    read_index,
)
from sag_dit.data.training_batches import as_it_is, name_hash, outlive_signals
from sag_dit.files import LOCK, atomic, file_sha256
from sag_dit.untrusted import read_json, read_json_as

CONFIG = "config.json"


@dataclass(frozen=True)
class LatentFolder:
    """The files of one encoding.

    A shard is written by one rank, whole or not at all, and recorded in ``records/`` once it is
    there. When all are, their records become ``index.json``.

    Example::

        folder = LatentFolder(Path("latents"))
        folder.claim({"size": 256})
    """

    path: Path

    @property
    def _records(self) -> Path:
        return self.path / "records"

    @cached_property
    def finished_index(self) -> Index | None:
        """The index that an earlier run has finished, if any."""
        try:
            return read_index(self.path)
        except ValueError:
            return None

    def settings(self) -> dict[str, Any]:
        """Return the settings that the folder holds latents of; nothing if there are none yet."""
        file = self.path / CONFIG
        return read_json(file) if file.exists() else {}

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this encoding's own, or find that it is.

        Raises:
            ValueError: it cannot be written, or holds something else; the differences are named.
        """
        # A folder that can be written to.
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.path, os.W_OK)
            if not writable and self.finished_index is None:
                raise PermissionError(f"no permission to write to {self.path}")
            held = any(each.name != LOCK for each in self.path.iterdir())
        except OSError as error:
            raise ValueError(
                f"out={self.path}: cannot be used as a folder of latents "
                f"({error.strerror or error}); choose another out"
            ) from error
        # What it holds was made with the same settings, or it is empty.
        file, before = self.path / CONFIG, self.settings()
        if before:
            differences = [
                f"{key}: there {before.get(key, 'not set')}, now {settings.get(key, 'not set')}"
                for key in sorted(before.keys() | settings.keys())
                if before.get(key) != settings.get(key)
            ]
            if differences:
                raise ValueError(
                    f"out={self.path} holds latents of other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nChoose another out, state no out, or repeat the former settings"
                )
        elif held:
            raise ValueError(f"out={self.path} holds other files; choose an empty or a new folder")
        else:
            with atomic(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        if writable:
            self._records.mkdir(exist_ok=True)

    def record(self, number: int) -> Shard | None:
        """Return what was recorded of a shard, here or in a finished index."""
        file = self._records / f"{number:05d}.json"
        if file.exists():
            return read_json_as(file, Shard)
        recorded = self.finished_index.shards if self.finished_index else ()
        return recorded[number] if number < len(recorded) else None

    def finished(self, number: int) -> Shard | None:
        """Return a shard's record if its file is what was recorded."""
        shard = self.record(number)
        if shard is None:
            return None
        file = self.path / shard.file
        whole = file.is_file() and file.stat().st_size == shard.bytes
        return shard if whole and file_sha256(file) == shard.sha256 else None

    def write(
        self,
        number: int,
        content: bytes,
        rows: int,
        skipped: Sequence[str],
        shape: tuple[int, int, int] | None = None,
    ) -> Shard:
        """Write a shard, then its record; ``shape`` is that of x_0 where it is not the index's."""
        file, digest = f"latents-{number:05d}.safetensors", hashlib.sha256(content).hexdigest()
        shard = Shard(file, rows, len(content), digest, tuple(skipped), shape)
        with atomic(self.path / file) as temporary, temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with atomic(self._records / f"{number:05d}.json") as temporary:
            temporary.write_text(json.dumps(asdict(shard)), encoding="utf-8")
        return shard

    def note(self, rank: int, images: int) -> None:
        """Tell the other ranks how many images this one is done with."""
        with atomic(self._records / f"rank-{rank}") as temporary:
            temporary.write_text(str(images), encoding="utf-8")

    def done(self, world: int) -> int:
        """Return how many images all ranks are done with."""
        total = 0
        for rank in range(world):
            file = self._records / f"rank-{rank}"
            if file.exists():
                total += int(file.read_text(encoding="utf-8"))
        return total

    def finish(self, shards: int, index: Index) -> Index:
        """Write the index of all shards; ``index`` has everything but shards and counts.

        Raises:
            ValueError: a shard is missing, or there is no image in any.
        """
        found = [self.record(number) for number in range(shards)]
        missing = [number for number, shard in enumerate(found) if shard is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {shards} shards are missing in {self.path}, the first is "
                f"{missing[0]}; repeat the command to make them"
            )
        index = replace(index, shards=tuple(shard for shard in found if shard is not None))
        if not index.images:
            raise ValueError(f"{self.path}: none of the images can be decoded")
        labels = np.concatenate([map_shard(self.path, each, index).labels for each in index.shards])
        counts = np.bincount(labels, minlength=len(index.class_names))
        index = replace(index, counts=tuple(counts.tolist()))
        with atomic(self.path / INDEX) as temporary:
            temporary.write_text(index.to_json(), encoding="utf-8")
        # What killed processes may have left; no other process writes any more.
        for file in [*self._records.iterdir(), *self.path.glob(".*.tmp")]:
            file.unlink()
        self._records.rmdir()
        return index


@dataclass(frozen=True)
class EncodingPlan:
    """Everything that is known before anything is encoded.

    Example::

        plan = EncodingPlan(crops, codec, LatentFolder(Path("latents")), index, rows=4096)
        for done in encode_share(plan, 0, 1, torch.device("cuda"), workers=8):
            print(done)
    """

    crops: Crops
    codec: VAECodec
    folder: LatentFolder
    index: Index
    """The index to be, still without shards."""
    rows: int

    @cached_property
    def shards(self) -> list[list[int]]:
        """The images of each shard, all of one bucket."""
        of = self.crops.bucket_of
        buckets = [np.flatnonzero(of == bucket).tolist() for bucket in np.unique(of)]
        return [
            images[at : at + self.rows]
            for images in buckets
            for at in range(0, len(images), self.rows)
        ]

    def shape_of(self, shard: int) -> tuple[int, int, int]:
        """Return (c, h, w) of x_0 in a shard."""
        sides = self.crops.buckets[self.crops.bucket_of[self.shards[shard][0]]]
        height, width = (latent_size(side, self.codec.factor) for side in sides)
        return self.index.shape[0], height, width

    def check_room(self) -> None:
        """Check that the disk holds what is still to be written.

        Raises:
            ValueError: it does not.
        """
        each = self.index.flips * 2 * DTYPES[self.index.dtype].itemsize
        needed = sum(
            len(images) * (each * math.prod(self.shape_of(number)) + 16)
            for number, images in enumerate(self.shards)
            if self.folder.record(number) is None
        )
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise ValueError(
                f"out={self.folder.path}: {needed / 1e6:,.1f} MB are needed and "
                f"{free / 1e6:,.1f} MB are free; make room, choose another out, or take "
                f"dtype=float16 or flip=false"
            )


@dataclass(frozen=True)
class _Job:
    """Some images of one shard."""

    shard: int
    images: Sequence[int]


@dataclass(frozen=True)
class _Read:
    """What a loader process made of a job: the crops that could be read, and which, or an error."""

    job: _Job
    kept: list[int]
    crops: Tensor
    error: str = ""


class _Reader(Dataset[_Read]):
    """Reads the crops of a job. Errors come back as text, without the loader's traceback."""

    def __init__(self, crops: Crops) -> None:
        self._crops = crops

    def __getitem__(self, job: _Job) -> _Read:
        kept, pixels = [], []
        try:
            for index in job.images:
                crop = self._crops.read(index)
                if crop is not None:
                    kept.append(index)
                    pixels.append(torch.from_numpy(crop))
        except (ValueError, OSError) as error:
            return _Read(job, [], torch.empty(0), str(error))
        return _Read(job, kept, torch.stack(pixels) if pixels else torch.empty(0))


def encode_crops(plan: EncodingPlan, crops: Pixels, device: torch.device) -> Tensor:
    """Return the moments (b, flips, 2, c, h, w) of crops, in the type they are stored in.

    Raises:
        ValueError: a value is not finite in that type.
    """
    crops = crops.to(device)
    views = [crops, crops.flip(-1)][: plan.index.flips]
    moments = torch.stack([torch.stack(plan.codec.posterior(view), dim=1) for view in views], dim=1)
    stored = moments.to(DTYPES[plan.index.dtype]).cpu()
    if not stored.isfinite().all():
        raise ValueError(
            f"dtype={plan.index.dtype}: a latent is not finite (the largest is "
            f"{moments.abs().max().item():.3g}); expected an undamaged autoencoder, and "
            f"dtype=float32 for one with values beyond 65504"
        )
    return stored


def encode_share(
    plan: EncodingPlan, rank: int, world: int, device: torch.device, workers: int
) -> Iterator[int]:
    """Encode the shards of one rank, every ``world``-th; yield how many images are done.

    A shard that is finished and intact is not made again.
    """
    # What is still to be read, in parts that the autoencoder takes at once.
    done, jobs = 0, []
    size = plan.codec.slice_size
    for shard in range(rank, len(plan.shards), world):
        images = plan.shards[shard]
        if plan.folder.finished(shard) is not None:
            done += len(images)
            yield done
        else:
            jobs += [_Job(shard, images[at : at + size]) for at in range(0, len(images), size)]
    loader: DataLoader[_Read] = DataLoader(
        _Reader(plan.crops),
        sampler=jobs,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        worker_init_fn=outlive_signals,
    )
    files = plan.crops.files
    kept: list[int] = []
    parts: list[Tensor] = []
    # A shard is written when the last of its images is encoded.
    for read in loader:
        if read.error:
            raise ValueError(read.error)
        if read.kept:
            parts.append(encode_crops(plan, read.crops, device))
            kept += read.kept
        done += len(read.job.images)
        images = plan.shards[read.job.shard]
        if read.job.images[-1] == images[-1]:
            skipped = [files.names[i] for i in sorted(set(images) - set(kept))]
            # A shard of unreadable images is empty, but has a shape.
            shape = plan.shape_of(read.job.shard)
            nothing = torch.empty(0, plan.index.flips, 2, *shape, dtype=DTYPES[plan.index.dtype])
            content = pack(
                torch.cat([nothing, *parts]),
                torch.from_numpy(files.labels[kept]),
                torch.tensor([name_hash(files.names[i]) for i in kept], dtype=torch.int64),
            )
            other = None if shape == plan.index.shape else shape
            plan.folder.write(read.job.shard, content, len(kept), skipped, other)
            kept, parts = [], []
        yield done
