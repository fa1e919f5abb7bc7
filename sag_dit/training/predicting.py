"""Predictor and its Bar: the one loop in which the ranks of a Trainer draw, or read, images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
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

from sag_dit.checkpoints import Model
from sag_dit.data.requests import PendingRequests
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Request, Settings
from sag_dit.traces import Maps
from sag_dit.training.module import DiffusionModule


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
            TextColumn("{task.description}", markup=False),
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


Consumer = Callable[[Any], object]
"""Takes each batch of this rank as soon as it is there, in its own way: writes it, measures it."""


class Predictor:
    """Draws sets of images on all ranks of one Trainer and hands each batch to consumers.

    ``make`` builds the Trainer from the options that drawing needs; what it adds (devices,
    precision) is the caller's. ``folder`` is where Lightning may write.

    Example::

        predictor = Predictor(partial(Trainer, accelerator="cpu"), folder.path)
        predictor.draw(model, requests, settings, [folder.write])
    """

    def __init__(
        self, make: Callable[..., Trainer], folder: Path, callbacks: Sequence[Callback] = ()
    ) -> None:
        self._loop = _Loop()
        self.trainer = make(
            logger=False,
            # Of training alone, as Lightning has them anyway: nobody else may set them.
            max_epochs=None,
            max_steps=-1,
            max_time=None,
            accumulate_grad_batches=1,
            gradient_clip_val=None,
            callbacks=[self._loop, *callbacks],
            # Ours instead: sharding of the requests, no_grad, and a bar over all ranks' images.
            use_distributed_sampler=False,
            inference_mode=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )

    def draw(
        self,
        model: Model,
        requests: Sequence[Request],
        settings: Settings,
        consumers: Sequence[Consumer],
        *,
        gallery: int = 0,
        maps: Maps | None = None,
        text: str = "sampling",
        done: int = 0,
    ) -> None:
        """Draw the requests; consumers get :class:`~sag_dit.sampling.Drawn` batches.

        The first ``gallery`` indices come with twins and traces. ``text`` stands before the bar,
        which counts from the ``done`` images of the set that are there already.
        """
        module = DiffusionModule(
            model, settings=settings, gallery=gallery, maps=maps, watch=self._loop.bar.step
        )
        data = PendingRequests(requests, settings.batch_size)
        self._run(module, data, consumers, text, done + len(requests), done)

    def read(
        self,
        data: LightningDataModule,
        consumers: Sequence[Consumer],
        *,
        text: str,
        total: int,
        read: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """Hand what ``read`` makes of each batch of ``data`` to consumers; nothing is drawn."""
        self._run(_Reading(read), data, consumers, text, total, 0)

    def _run(
        self,
        module: LightningModule,
        data: LightningDataModule,
        consumers: Sequence[Consumer],
        text: str,
        total: int,
        done: int,
    ) -> None:
        self._loop.consumers, self._loop.told = consumers, (text, total, done)
        self.trainer.predict(module, datamodule=data, return_predictions=False)


class _Reading(LightningModule):
    """A module without weights that reads batches."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self._read(batch)


class _Loop(Callback):
    """Gives each batch to the consumers, and shows on rank 0 how many images are there.

    Ranks have equal shares, so that rank 0's own count tells for all.
    """

    def __init__(self) -> None:
        self.bar = Bar()
        self.consumers: Sequence[Consumer] = ()
        self.told = ("", 0, 0)

    def on_predict_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.bar.begin(*self.told)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        # Requests are listed; of images from disk there is a pair, (images, indices).
        rows = len(batch) if isinstance(batch[0], Request) else len(batch[0])
        self.bar.begin_batch(rows * trainer.world_size)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        for consume in self.consumers:
            consume(outputs)
        self.bar.end_batch()

    def on_predict_end(self, *_: Any) -> None:
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        # So that the error stands alone.
        self.bar.stop()
