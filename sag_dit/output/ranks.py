"""How ranks tell each other on disk that they are alive, have finished or have failed.

A collective at the end would hang for as long as the slowest rank needs, or for ever after a
failure, and Lightning lets rank 0 end well when another rank has not. Files cannot hang.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from sag_dit.files import atomic

PATIENCE = 1800.0
"""Seconds in which nothing gets done, although all ranks are alive, after which rank 0 gives up."""
BEAT = 3.0
"""Seconds between two heartbeats of a rank."""
SILENCE = 45.0
"""Seconds without a heartbeat after which a rank is taken to be lost, with its machine perhaps."""


@dataclass
class _Heard:
    """The last heartbeat that was read of a rank, and when it was a new one, by our own clock."""

    beat: str
    since: float

    def listen(self, file: Path) -> float:
        """Read the heartbeat again; return for how many seconds it has been the same."""
        beat = file.read_text(encoding="utf-8") if file.exists() else ""
        now = time.monotonic()
        # An empty file is one that is being written.
        if beat and beat != self.beat:
            self.beat, self.since = beat, now
        return now - self.since

    @property
    def host(self) -> str:
        """The machine that the rank runs on, as far as it was told."""
        return self.beat.partition(" ")[2] or "a machine that has not reported"


def _lost(rank: int, heard: _Heard, silence: float) -> str:
    return (
        f"rank {rank} on {heard.host} is lost: no heartbeat for {silence:.0f} s; what is written "
        f"is kept, repeat the command to go on"
    )


class RankReports:
    """A few small files per rank under ``folder/ranks``: how it ended, and that it is alive.

    Times are compared with the reader's own clock alone, so that machines may disagree about it.

    Example::

        reports = RankReports(Path("outputs/sample/digits-1f3a"), rank=0, world=2)
        with reports.reporting():
            predictor.draw(model, requests, settings, write=folder.write)
        reports.wait(folder.journal.length)
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = folder / "ranks", rank, world

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank:04d}.txt"

    def _alive(self, rank: int) -> Path:
        return self._folder / f"{rank:04d}.alive"

    @contextmanager
    def reporting(self, beat: float = BEAT) -> Iterator[None]:
        """Tell every ``beat`` seconds that the work within goes on, and at its end how it ended.

        An error is reported and goes on.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file(self._rank).unlink(missing_ok=True)
        ended = Event()
        heart = Thread(target=self._beat, args=(ended, beat), daemon=True)
        heart.start()
        try:
            yield
        except BaseException as error:
            # A disk that took no image takes no report either: the first error is what is told.
            with suppress(OSError):
                self._write(f"{type(error).__name__}: {error}")
            raise
        finally:
            ended.set()
            heart.join()
        self._write("ok")

    def _beat(self, ended: Event, seconds: float) -> None:
        number = 0
        while True:
            try:
                # Written in place: network file systems show a reopened file as it is, but may show
                # a renamed one late.
                text = f"{number} {socket.gethostname()}"
                self._alive(self._rank).write_text(text, encoding="utf-8")
            except OSError:
                pass  # A disk that fails is told by what is written there.
            number += 1
            if ended.wait(seconds):
                return

    def _write(self, text: str) -> None:
        with atomic(self._file(self._rank)) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def watching(
        self, lost: Callable[[str], object], silence: float = SILENCE, every: float = BEAT
    ) -> Iterator[None]:
        """Call ``lost`` with a sentence when another rank falls silent while the work goes on.

        A rank counts from its first heartbeat on, so that nothing happens where ranks see no disk
        in common.
        """
        ended = Event()
        watch = Thread(target=self._watch, args=(ended, lost, silence, every), daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()

    def _watch(
        self, ended: Event, lost: Callable[[str], object], silence: float, every: float
    ) -> None:
        others = [rank for rank in range(self._world) if rank != self._rank]
        heard = {rank: _Heard("", time.monotonic()) for rank in others}
        for rank, last in heard.items():
            last.listen(self._alive(rank))
        first = {rank: last.beat for rank, last in heard.items()}
        while not ended.wait(every):
            for rank, last in heard.items():
                silent = last.listen(self._alive(rank)) > silence
                # What an earlier run has left is no heartbeat of this one.
                if silent and last.beat != first[rank] and not self._file(rank).exists():
                    lost(_lost(rank, last, silence))
                    return

    def wait(
        self,
        sign_of_life: Callable[[], object],
        patience: float = PATIENCE,
        silence: float = SILENCE,
    ) -> None:
        """Wait until every rank has reported; ``sign_of_life`` changes while any gets work done.

        Raises:
            ValueError: a rank failed, one has had no heartbeat for ``silence`` seconds, or nothing
                got done for ``patience`` seconds.
        """
        last, since = sign_of_life(), time.monotonic()
        heard = {rank: _Heard("", since) for rank in range(self._world)}
        while heard:
            # Who has ended, well or not, is waited for no longer.
            for rank in sorted(heard):
                if self._file(rank).exists():
                    report = self._file(rank).read_text(encoding="utf-8")
                    if report != "ok":
                        raise ValueError(f"rank {rank} failed: {report}")
                    del heard[rank]
            if not heard:
                return
            # A rank that was killed, or whose machine is gone, cannot report.
            for rank, last_heard in heard.items():
                if last_heard.listen(self._alive(rank)) > silence:
                    raise ValueError(_lost(rank, last_heard, silence))
            # A rank that lives may still hang.
            now = sign_of_life()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise ValueError(
                    f"rank {', '.join(map(str, sorted(heard)))} has got nothing done for "
                    f"{patience:.0f} s; what is written is kept, repeat the command to go on"
                )
            time.sleep(0.1)

    def clear(self) -> None:
        """Remove the reports after a run that went well."""
        for file in self._folder.iterdir():
            file.unlink()
        self._folder.rmdir()
