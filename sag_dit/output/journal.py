"""Journal: what each image was when it was written, to tell later whether it still is."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from sag_dit.bounds import Natural, checked
from sag_dit.files import atomic, writing
from sag_dit.sampling import Found
from sag_dit.untrusted import parse_json

LINE = 65_536
"""Characters of a line that can be ours; a search of many steps makes a long one."""


@dataclass(frozen=True)
class Searched:
    """What a search chose for an image: its score, and pairs (draw, particle) of its noise.

    Raises:
        ValueError: the lineage holds no pairs.

    Example:
        >>> Searched(score=0.9, lineage=[[0, 2], [6, 1]]).manifest()
        {'score': 0.9, 'particle': 1, 'lineage': [[0, 2], [6, 1]]}
    """

    score: float
    lineage: list[list[Natural]]

    def __post_init__(self) -> None:
        if not self.lineage or any(len(pair) != 2 for pair in self.lineage):
            raise ValueError(f"lineage={self.lineage}: expected pairs of a draw and a particle")

    @classmethod
    def of(cls, found: Found) -> Self:
        """Return what a search found, as files hold it."""
        return cls(found.score, [list(pair) for pair in found.lineage])

    def manifest(self) -> dict[str, Any]:
        """Return what the line of a manifest says of it."""
        return {"score": self.score, "particle": self.lineage[-1][1], "lineage": self.lineage}


class FileState(NamedTuple):
    """The size in bytes and the hash of a file; of files older than the journal it may be None.

    ``search`` is what a search chose, where there was one.

    Example:
        >>> FileState(size=120, sha256="9f86d081").size
        120
    """

    size: int
    sha256: str | None
    search: Searched | None = None


@dataclass(frozen=True)
class Noted:
    """A line of a journal.

    Example:
        >>> Noted(index=3, size=120, sha256=None).size
        120
    """

    index: Natural
    size: Natural
    sha256: str | None
    search: Searched | None = None


@dataclass(frozen=True)
class Journal:
    """What is known of a folder's images, by index.

    While images are drawn, every process adds lines to a file of its own in ``journal/``: first the
    line, then the image, so that an image without a line was not written by us. At the end these
    become ``journal.jsonl``. A line that a crash has cut is passed over.

    Example::

        journal = Journal(Path("outputs/sample/digits-1f3a"))
        journal.note({0: FileState(120, "9f86d081...")})
        journal.merge()
    """

    folder: Path

    @property
    def _merged(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def _parts(self) -> list[Path]:
        """The processes' files, the oldest first."""
        found = (self.folder / "journal").glob("*.jsonl")
        return sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.name))

    def begun(self) -> bool:
        """Whether there is any journal; folders of former versions have none."""
        return self._merged.exists() or bool(self._parts)

    def note(self, entries: Mapping[int, FileState]) -> None:
        """Add what this process is about to write."""
        file = self.folder / "journal" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(_as_lines(entries))

    def length(self) -> int:
        """Return a number that grows with every image, on whichever rank."""
        return sum(file.stat().st_size for file in self._parts)

    def read(self) -> dict[int, FileState]:
        """Return all that is known; what was written last counts."""
        known = _read_part(self._merged)
        for part in self._parts:
            known |= _read_part(part)
        return known

    def keep(self, entries: Mapping[int, FileState]) -> None:
        """Write ``journal.jsonl``, and take away what the processes had left."""
        parts = self._parts
        with atomic(self._merged) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write(_as_lines(dict(sorted(entries.items()))))
            stream.flush()
            os.fsync(stream.fileno())
        for part in parts:
            part.unlink()
        if (self.folder / "journal").is_dir():
            (self.folder / "journal").rmdir()

    def merge(self) -> bool:
        """Make one file of all; return whether there was anything new."""
        new = bool(self._parts)
        if new:
            self.keep(self.read())
        return new


def _as_lines(entries: Mapping[int, FileState]) -> str:
    rows = []
    for index, entry in entries.items():
        searched = {} if entry.search is None else {"search": asdict(entry.search)}
        rows.append({"index": index, "size": entry.size, "sha256": entry.sha256, **searched})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_part(file: Path) -> dict[int, FileState]:
    found = {}
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            for line in iter(lambda: stream.readline(LINE), ""):
                try:
                    row = checked(parse_json(line, file), Noted, str(file))
                except ValueError:
                    continue
                found[row.index] = FileState(row.size, row.sha256, row.search)
    except FileNotFoundError:
        return {}
    return found
