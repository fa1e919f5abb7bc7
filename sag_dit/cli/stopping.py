"""SIGTERM during prediction, which Lightning lets pass, or tells ranks that may be busy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from sag_dit.cli.app import take_sigterm


class LeaveWhenTold(Callback):
    """Takes SIGTERM over from Lightning while it predicts; Lightning gives it back at the end.

    Its own handler first tells all ranks in a collective, which waits for ranks that are in another
    one. A rank that leaves ends the command instead: who started the others ends them.
    """

    def on_predict_start(self, *_: Any) -> None:
        """Install the handler."""
        take_sigterm()
