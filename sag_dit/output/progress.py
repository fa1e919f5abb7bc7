"""Bar: how many images of a set are there, how fast they come, and the time left."""

from __future__ import annotations

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


class _Rate(ProgressColumn):
    """Images per second, or seconds per image where that is the larger number."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} images/s" if speed >= 1 else f"{1 / speed:.1f} s/image")


class Bar:
    """A line on stderr for one set of images; between batches it moves with the sampler's steps.

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

    def begin(self, text: str, total: int, done: int = 0) -> None:
        """Show the bar of another set, of which ``done`` images are there already."""
        self.stop()
        self._total, self._done = total, done
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.add_task(text, total=total, completed=done)
        self._progress.start()

    def begin_batch(self, rows: int) -> None:
        """Note how many images the next batch gives, on all ranks."""
        self._rows = rows

    def step(self, step: SampleStep) -> None:
        """Move by one step of the batch that is being drawn."""
        self._move(self._rows * (step.step.index + 1) // step.step.count)

    def end_batch(self) -> None:
        """Count the batch as done."""
        self._done += self._rows
        self._move(0)

    def _move(self, beyond: int) -> None:
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=min(self._total, self._done + beyond))

    def stop(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
