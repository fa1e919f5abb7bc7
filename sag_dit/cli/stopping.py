"""Stopping: signals during prediction, and ranks that end together when one of them fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from sag_dit.cli.app import KILL, TOLD_TO_STOP, take_signals
from sag_dit.output.ranks import RankReports
from sag_dit.raised import KeptNote, raised_by

EVERY = 0.2
"""Seconds between two looks at the ranks that this process has started."""
GRACE = 10.0
"""Seconds that the first rank has to end in its own words when another one has failed."""

OF_SIGNALS = {128 + number for number in TOLD_TO_STOP}
"""Exit codes of a command that was told to stop."""

Ranks = Sequence["subprocess.Popen[bytes]"]


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """End the ranks that Lightning has started when the work within fails.

    They would go on without this process, or wait for it, holding their devices.

    Raises:
        ValueError: what failed is that one of them was killed; it is named.
    """
    try:
        yield
    except BaseException as error:
        ranks: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        # A connection breaks a moment before the system tells why.
        deadline = time.monotonic() + (2.0 if isinstance(error, RuntimeError) else 0.0)
        while (told := _killed(ranks)) is None and ranks and time.monotonic() < deadline:
            time.sleep(EVERY)
        _end(ranks)
        if told is not None and isinstance(error, Exception):
            raise ValueError(told) from error
        raise


@contextmanager
def telling_what_is_kept(trainer: Trainer) -> Iterator[None]:
    """Note on an error after which step of a training it was raised, by what, and what is kept.

    A checkpoint is not saved there: a step that an error has cut in two is none that the same run
    without the error would have had, on this rank or on the others.
    """
    try:
        yield
    except SystemExit as stop:
        # One of ours says how to go on, as Ctrl-C and SIGTERM do.
        if getattr(stop, "told", None) is None and stop.code not in OF_SIGNALS:
            asked = stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else stop
            print(f"stopped: {_left_at(asked, trainer, 'has stopped')}", file=sys.stderr)
        raise
    except Exception as error:
        error.add_note(KeptNote(_left_at(error, trainer, "failed")))
        raise


def _left_at(error: BaseException, trainer: Trainer, what: str) -> str:
    from sag_dit.training.resume import FOLDER, steps_of

    who = raised_by(error)
    at = f"{who} {what} after" if who else "that was after"
    at = f"{at} step {trainer.global_step:,}"
    checkpoints = steps_of(Path(trainer.default_root_dir) / FOLDER)
    if not checkpoints:
        return f"{at}, before there was a checkpoint: the same command begins anew"
    return f"{at}; the newest checkpoint is {checkpoints[0]}, from which the same command goes on"


@contextmanager
def naming_lost_nodes(trainer: Trainer) -> Iterator[None]:
    """End this process when a rank on another machine falls silent while all train, and tell which.

    The others wait for it in a collective, which nothing interrupts and which gives up late.
    """
    if trainer.num_nodes == 1:
        yield
        return
    folder = Path(trainer.default_root_dir)
    reports = RankReports(folder, trainer.global_rank, trainer.world_size)
    with reports.reporting(), reports.watching(_end_now):
        yield
    if trainer.is_global_zero:
        reports.wait(lambda: None)
        reports.clear()


def _end_now(told: str) -> None:
    sys.stdout.flush()
    print(f"\nerror: {told}", file=sys.stderr, flush=True)
    os._exit(1)


def watch_ranks(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End this process and its ranks when one of them ends otherwise than well, and tell which.

    In place of Lightning's own watch, which kills all without a word. A collective that waits for a
    rank that is gone cannot be interrupted, so this is a thread that ends the process.
    """
    threading.Thread(target=_watch, args=(ranks,), daemon=True).start()


def _watch(ranks: list[subprocess.Popen[bytes]]) -> None:
    failed_since: float | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return
        told = _killed(ranks)
        if told is None and any(codes):
            # It has told why; the first rank reads that where it waits, and ends by itself.
            failed_since = failed_since or time.monotonic()
            if time.monotonic() - failed_since > GRACE:
                which = next(place for place, code in enumerate(codes, start=1) if code)
                told = f"rank {which} failed; what is written is kept, repeat the command to go on"
        if told is not None and ranks:
            _end(ranks)
            _end_now(told)
        time.sleep(EVERY)


def _killed(ranks: Ranks) -> str | None:
    """Return which rank was killed by what, None if none was; to be told to stop does not count."""
    for number, rank in enumerate(ranks, start=1):
        code = rank.poll()
        if code is not None and code < 0 and -code not in TOLD_TO_STOP:
            name = signal.Signals(-code).name
            return (
                f"rank {number} was killed by signal {-code} ({name}), often for want of memory; "
                f"what is written is kept, repeat the command to complete"
            )
    return None


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill ranks; whoever watches them then finds none, since this is no fault of theirs."""
    ending = list(ranks)
    ranks.clear()
    for rank in ending:
        rank.send_signal(KILL)


class LeaveWhenTold(Callback):
    """Takes SIGTERM over from Lightning while it predicts; Lightning gives it back at the end.

    Its own handler first tells all ranks in a collective, which waits for ranks that are in another
    one. A rank that leaves ends the command instead: who started the others ends them.

    Example::

        predictor = Predictor(partial(Trainer, accelerator="cpu"), folder, [LeaveWhenTold()])
    """

    def on_predict_start(self, *_: Any) -> None:
        """Install the handler."""
        take_signals()
