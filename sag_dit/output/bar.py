"""Bar: a line on stderr that counts images while they are drawn."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Column
from rich.text import Text

from sag_dit.sampler import SampleStep

SHORT = 10.0
"""Seconds that are not worth a line."""


def in_words(seconds: float) -> str:
    """Return a time as one says it.

    Example:
        >>> in_words(44), in_words(200), in_words(9000)
        ('40 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _Rate(ProgressColumn):
    """Images per second, or seconds per image where that is the larger number."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} images/s" if speed >= 1 else f"{1 / speed:.1f} s/image")


class Bar:
    """A line on stderr for one set of images; between batches it moves with the sampler's steps.

    Where stderr is no terminal, nothing moves; a line tells once how long the rest will take.

    Example::

        bar = Bar()
        bar.begin("sampling", total=300)
        bar.begin_batch(16)
        draw_batch(model, requests, settings, watch=bar.step)
        bar.end_batch()
        bar.stop()
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._total = self._done = self._rows = 0
        self._text, self._since, self._tells = "", 0.0, False

    def begin(self, text: str, total: int, done: int = 0) -> None:
        """Show the bar of another set, of which ``done`` images are there already."""
        self.stop()
        self._total, self._done, self._text = total, done, text
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.add_task(text, total=total, completed=done)
        self._progress.start()
        self._tells = not self._progress.console.is_terminal

    def begin_batch(self, rows: int, usual: bool = True) -> None:
        """Note how many images the next batch gives, on all ranks.

        ``usual`` says that the batches after it take about as long.
        """
        self._rows, self._since = rows, time.monotonic() if usual else 0.0

    def step(self, step: SampleStep) -> None:
        """Move by one step of the batch that is being drawn."""
        self._move(self._rows * (step.step.index + 1) // step.step.count)

    def end_batch(self) -> None:
        """Count the batch as done."""
        self._done += self._rows
        self._move(0)
        if self._tells and self._since and self._progress is not None:
            self._tells = False
            each = (time.monotonic() - self._since) / self._rows
            left = max(0, self._total - self._done) * each
            if left >= SHORT:
                self._progress.console.print(
                    f"{self._text}: about {in_words(left)} left",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

    def _move(self, beyond: int) -> None:
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=min(self._total, self._done + beyond))

    def stop(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
