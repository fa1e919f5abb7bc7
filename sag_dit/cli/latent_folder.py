"""LatentFolder: what ``encode.py`` has written, what is missing, and how far all ranks are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sag_dit.data.shards import INDEX, Index, Shard, file_sha256, map_shard, read_index, read_shard
from sag_dit.files import atomic

CONFIG = "config.json"


@dataclass(frozen=True)
class LatentFolder:
    """The files of one encoding.

    A shard is written by one rank, whole or not at all, and recorded in ``records/`` once it is
    there. When all are, their records become ``index.json``.
    """

    path: Path

    @property
    def _records(self) -> Path:
        return self.path / "records"

    @cached_property
    def _recorded(self) -> tuple[Shard, ...]:
        """The shards of an index that an earlier run has finished."""
        try:
            return read_index(self.path).shards
        except ValueError:
            return ()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this encoding's own, or find that it is.

        Raises:
            ValueError: it cannot be written, or holds something else; the differences are named.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(f"no permission to write to {self.path}")
            held = any(self.path.iterdir())
        except OSError as error:
            raise ValueError(
                f"out={self.path}: cannot be used as a folder of latents "
                f"({error.strerror or error}); choose another out"
            ) from error
        file = self.path / CONFIG
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            differences = [
                f"{key}: there {before.get(key, 'not set')}, now {settings.get(key, 'not set')}"
                for key in sorted(before.keys() | settings.keys())
                if before.get(key) != settings.get(key)
            ]
            if differences:
                raise ValueError(
                    f"out={self.path} holds latents of other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nChoose another out, leave out unset, or repeat the former settings"
                )
        elif held:
            raise ValueError(f"out={self.path} holds other files; choose an empty or a new folder")
        else:
            with atomic(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        self._records.mkdir(exist_ok=True)

    def record(self, number: int) -> Shard | None:
        """Return what was recorded of a shard, here or in a finished index."""
        file = self._records / f"{number:05d}.json"
        if file.exists():
            return read_shard(json.loads(file.read_text(encoding="utf-8")))
        return self._recorded[number] if number < len(self._recorded) else None

    def finished(self, number: int) -> Shard | None:
        """Return a shard's record if its file is what was recorded."""
        shard = self.record(number)
        if shard is None:
            return None
        file = self.path / shard.file
        whole = file.is_file() and file.stat().st_size == shard.bytes
        return shard if whole and file_sha256(file) == shard.sha256 else None

    def write(self, number: int, content: bytes, rows: int, skipped: Sequence[str]) -> Shard:
        """Write a shard, then its record."""
        file = f"latents-{number:05d}.safetensors"
        shard = Shard(file, rows, len(content), hashlib.sha256(content).hexdigest(), tuple(skipped))
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
