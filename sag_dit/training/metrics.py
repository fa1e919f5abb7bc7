"""Metrics of images drawn during training: FID of the averaged weights over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sag_dit.evaluation.suite import METRICS, Suite
from sag_dit.sampling import Request, Settings, drawn
from sag_dit.training.module import DiffusionModule
from sag_dit.training.resume import FOLDER


class TrackMetrics(Callback):
    """Draws the same requests every ``every_n_steps`` steps on all ranks, and logs their metrics.

    They are drawn with the averaged weights where there are any, logged as ``metrics/NAME``, and
    left for checkpoint callbacks to monitor. Nothing of the training's own randomness is used.

    Raises:
        ValueError: no positive number of steps, or fewer than two requests.
    """

    def __init__(
        self, suite: Suite, requests: Sequence[Request], settings: Settings, every_n_steps: int
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"track.every_n_steps={every_n_steps}: expected 1 or more")
        if len(requests) < 2:
            raise ValueError(f"track.num_images={len(requests)}: expected 2 or more")
        self._suite, self._every = suite, every_n_steps
        self._requests, self._settings = list(requests), settings

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure if it is time."""
        accumulates = trainer.fit_loop.epoch_loop._should_accumulate()
        if accumulates or trainer.global_step % self._every:
            return
        if not isinstance(pl_module, DiffusionModule):
            raise TypeError(f"{type(pl_module).__name__} cannot draw; expected a DiffusionModule")
        found = self.measure(trainer, pl_module)
        values = {f"metrics/{name}": value for name, value in found.items()}
        # To the loggers directly: these steps need not be those at which training is logged.
        for name, value in values.items():
            pl_module.log(name, value, logger=False, rank_zero_only=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def measure(self, trainer: Trainer, module: DiffusionModule) -> dict[str, float]:
        """Draw, and return the metrics of all ranks' images; every rank has to call this."""
        suite = self._suite.to(module.device)
        suite.reset()
        rank, world = trainer.global_rank, trainer.world_size
        with module.model_to_draw_with() as model:
            for batch in drawn(model, self._requests, self._settings, rank=rank, world=world):
                suite.update(batch.images, batch.indices)
        return suite.compute()


def best_by(metric: str, out: Path, every_n_steps: int) -> ModelCheckpoint:
    """Return a callback that keeps the checkpoint with the best value of a tracked metric."""
    return ModelCheckpoint(
        dirpath=out / FOLDER,
        filename=f"best-{metric}-{{step:08d}}",
        auto_insert_metric_name=False,
        monitor=f"metrics/{metric}",
        mode="max" if METRICS[metric].higher_is_better else "min",
        save_top_k=1,
        every_n_train_steps=every_n_steps,
        enable_version_counter=False,
    )
