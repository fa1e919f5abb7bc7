"""Progress of a sampling run: images done of all, rate, and time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
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
from rich.text import Text

from sag_dit.output.folder import SampleFolder
from sag_dit.sampler import SampleStep


class _Rate(ProgressColumn):
    """Images per second, or seconds per image where that is the larger number."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} images/s" if speed >= 1 else f"{1 / speed:.1f} s/image")


class SampleProgress(Callback):
    """Shows on rank 0 how many images of the whole run are there, whichever rank drew them.

    Between finished batches the bar moves with the steps of rank 0's own batch.
    """

    def __init__(self, folder: SampleFolder, total: int) -> None:
        self._folder, self._total = folder, total
        self._progress: Progress | None = None
        self._task: Any = None
        self._rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar at what earlier runs have left."""
        if not trainer.is_global_zero:
            return
        self._progress = Progress(
            TextColumn("sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(
            "sampling", total=self._total, completed=self._folder.count()
        )
        self._progress.start()

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note how many images the next batch will give."""
        self._rows = len(batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what all ranks have written."""
        if self._progress is not None:
            self._progress.update(self._task, completed=self._folder.count())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar down."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the bar down, so that the error stands alone."""
        self._stop()

    def watch(self, step: SampleStep) -> None:
        """Move the bar by one step of this rank's batch."""
        if self._progress is not None:
            self._progress.advance(self._task, self._rows / step.step.count)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
