"""Stopping: signals during prediction, and ranks that end together when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer

from sag_dit.cli.app import KILL, take_signals


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """End the ranks that Lightning has started when the work within fails.

    They would go on without this process, or wait for it, holding their devices.
    """
    try:
        yield
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(KILL)
        raise


class LeaveWhenTold(Callback):
    """Takes SIGTERM over from Lightning while it predicts; Lightning gives it back at the end.

    Its own handler first tells all ranks in a collective, which waits for ranks that are in another
    one. A rank that leaves ends the command instead: who started the others ends them.
    """

    def on_predict_start(self, *_: Any) -> None:
        """Install the handler."""
        take_signals()
