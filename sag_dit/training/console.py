"""What a run shows while it trains: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar, convert_inf
from lightning.pytorch.loggers import Logger

from sag_dit.output.bar import in_words

SECONDS = 10.0
"""At least so many seconds lie between two lines of training."""


def _rate(value: float) -> str:
    return f"{value:,.0f} images/s" if value >= 10 else f"{value:.2g} images/s"


SHOWN: Mapping[str, Callable[[float], str]] = {
    "train/loss": "loss {:.4f}".format,
    "images/s": _rate,
    "mfu": "MFU {:.0%}".format,
    "memory_gb": "{:.2f} GB".format,
}
"""What is shown of training, and how; the rest is in the loggers."""


def on_a_terminal() -> bool:
    """Whether somebody sees a bar move."""
    return sys.stderr is not None and sys.stderr.isatty()


MEASURED = ("val/", "metrics/")
"""How names begin that are always shown."""


class Progress(TQDMProgressBar):
    """Lightning's bar over the whole run, so that its time left is also right after a stop.

    It stands on stderr, alone, and shows the numbers that were logged last: reading new ones at
    every step would have the device waited for.

    Example::

        trainer = Trainer(callbacks=[Progress()])
    """

    shows_the_log = True
    """It asks for no numbers of its own."""
    _shown: dict[str, int | str | float | dict[str, float]]

    @property
    def total_train_batches(self) -> int | float:
        """All batches of the run."""
        steps = self.trainer.max_steps
        if steps < 0:
            return super().total_train_batches
        return steps * self.trainer.accumulate_grad_batches

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar, on stderr."""
        return Tqdm(
            desc=self.train_description,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that is not shown."""
        return Tqdm(disable=True)

    def init_sanity_tqdm(self) -> Tqdm:
        """Return a bar that is not shown."""
        return Tqdm(disable=True)

    def on_train_start(self, *_: Any) -> None:
        """Begin where the run goes on."""
        super().on_train_start()
        self._shown = {}
        bar = self.train_progress_bar
        bar.reset(convert_inf(self.total_train_batches))
        bar.initial = bar.n = self.trainer.fit_loop.total_batch_idx + 1

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Leave the bar alone: an epoch is all of a run."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Read what the step before has logged, if it has."""
        self._look(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move, also where a short "epoch" begins anew."""
        done, bar = trainer.fit_loop.total_batch_idx + 1, self.train_progress_bar
        if self._should_update(done, bar.total):
            bar.n = done
            bar.set_postfix(self._shown)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Show what the last step has logged."""
        self._look(trainer)
        self.train_progress_bar.set_postfix(self._shown)
        super().on_train_end()

    def _look(self, trainer: Trainer) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            found = trainer.logged_metrics
            self._shown = {name: float(found[name]) for name in SHOWN if name in found}

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what was logged last of what is shown."""
        return self._shown


class Lines(Logger):
    """Writes a line on stderr now and then, where it ends in a file and a bar would fill it.

    A line stands for an entry of the log, at most one in ten seconds; the first and the last entry
    and those of validation and metrics always have theirs. What callbacks such as Lightning's
    DeviceStatsMonitor log by themselves is in the log alone. The time that is left follows from the
    steps since the start, with all that is done between them.

    Example::

        trainer.loggers = [*trainer.loggers, Lines(trainer)]
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer = trainer
        self._first: tuple[int, float] | None = None
        self._said = 0.0

    @property
    def name(self) -> str:
        """It has none, and writes no files."""
        return ""

    @property
    def version(self) -> str:
        """There is one only."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Write nothing: settings stand in the run's ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a line, if it is time."""
        now, done, steps = time.monotonic(), self._trainer.global_step, self._trainer.max_steps
        trained = "train/loss" in metrics
        measured = any(name.startswith(MEASURED) for name in metrics)
        if not (trained or measured or self._trainer.validating):
            return
        first = self._first or (done, now)
        self._first = first
        last = done >= steps > 0
        if trained and done > first[0] and not last and now - self._said < SECONDS:
            return
        parts = [show(metrics[name]) for name, show in SHOWN.items() if name in metrics]
        if trained:
            self._said = now
            if first[0] < done < steps:
                left = (steps - done) * (now - first[1]) / (done - first[0])
                parts.append(f"{in_words(left)} left")
        else:
            parts += [f"{name} {value:.4g}" for name, value in metrics.items() if "/" in name]
        if parts:
            place = f"step {done:,} of {steps:,}" if steps > 0 else f"step {done:,}"
            print(f"{place}: {', '.join(parts)}", file=sys.stderr, flush=True)
