"""How ranks tell each other on disk that they have finished or failed.

A collective at the end would hang for as long as the slowest rank needs, or for ever after a
failure, and Lightning lets rank 0 end well when another rank has not. Files cannot hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sag_dit.files import atomic

PATIENCE = 1800.0
"""Seconds without a sign of life of the other ranks after which rank 0 stops waiting."""


class RankReports:
    """One small file per rank under ``folder/ranks``: ``ok``, or what went wrong."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = folder / "ranks", rank, world

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank:04d}.txt"

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report how the work within ends. An error is reported and goes on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file(self._rank).unlink(missing_ok=True)
        try:
            yield
        except BaseException as error:
            self._write(f"{type(error).__name__}: {error}")
            raise
        self._write("ok")

    def _write(self, text: str) -> None:
        with atomic(self._file(self._rank)) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def wait(self, sign_of_life: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait until every rank has reported; ``sign_of_life`` changes while any is working.

        Raises:
            ValueError: a rank failed, or none has shown a sign of life for ``patience`` seconds.
        """
        last, since = sign_of_life(), time.monotonic()
        waiting = set(range(self._world))
        while waiting:
            for rank in sorted(waiting):
                if self._file(rank).exists():
                    report = self._file(rank).read_text(encoding="utf-8")
                    if report != "ok":
                        raise ValueError(f"rank {rank} failed: {report}")
                    waiting.discard(rank)
            if not waiting:
                return
            now = sign_of_life()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise ValueError(
                    f"rank {', '.join(map(str, sorted(waiting)))} has shown no sign of life for "
                    f"{patience:.0f} s; what is written is kept, repeat the command to go on"
                )
            time.sleep(0.1)

    def clear(self) -> None:
        """Remove the reports after a run that went well."""
        for file in self._folder.glob("*.txt"):
            file.unlink()
        self._folder.rmdir()
