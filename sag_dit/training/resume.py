"""Going on where a run was stopped: the newest checkpoint that can be read, and clean stops."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from sag_dit.checkpoints import build, write_safetensors
from sag_dit.training.module import DiffusionModule

FOLDER = "checkpoints"
SIGTERM_EXIT = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """Raised on every rank at the same step boundary after SIGTERM; its exit code is 143."""

    def __init__(self) -> None:
        super().__init__(SIGTERM_EXIT)


def checkpoint_callbacks(out: Path, every_n_steps: int) -> list[ModelCheckpoint]:
    """Return callbacks that keep the last two checkpoints and the one best on held-out images.

    Two, because the newest may be truncated by a full disk or a crash of the machine.
    """
    last = ModelCheckpoint(
        dirpath=out / FOLDER,
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=every_n_steps,
    )
    best = ModelCheckpoint(
        dirpath=out / FOLDER,
        filename="best-{step:08d}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        mode="min",
        save_top_k=1,
    )
    return [last, best]


def export(trainer: Trainer, module: DiffusionModule, out: Path) -> None:
    """Write the weights that are to be sampled with as safetensors; all ranks take part.

    Sharded weights are gathered one at a time; rank 0 writes.
    """
    state = {}
    for name, tensor in module.evaluated.network.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if trainer.is_global_zero:
            state[name] = whole.detach().cpu().clone()
    if not trainer.is_global_zero:
        return
    description = module.model.description
    denoiser = build(description)
    denoiser.network.load_state_dict(state)
    extra: dict[str, Any] = {
        key: description[key] for key in ("defaults", "vae") if key in description
    }
    write_safetensors(out, denoiser, extra)


def readable(checkpoint: Path) -> bool:
    """Say whether a checkpoint can be read to its end; a sharded one is a folder."""
    try:
        if checkpoint.is_dir():
            return (checkpoint / ".metadata").is_file() and (checkpoint / "meta.pt").is_file()
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        warnings.warn(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}) and is passed over; "
            f"training goes on from the checkpoint before it",
            stacklevel=2,
        )
        return False
    return True


def newest_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read, or None to begin anew."""
    found = sorted((out / FOLDER).glob("step-*.ckpt"), reverse=True)
    return next((checkpoint for checkpoint in found if readable(checkpoint)), None)


class StopOnSigterm(Callback):
    """After SIGTERM on any rank, stop all ranks at the same step boundary, save, and exit with 143.

    The handler only sets a flag: saving within a signal handler can meet a half-finished step.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM over from Lightning."""
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Agree with the other ranks whether one was told to stop."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer.save_checkpoint(self._out / FOLDER / f"step-{trainer.global_step:08d}.ckpt")
            raise Stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give SIGTERM back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
