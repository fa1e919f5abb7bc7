"""Going on where a run was stopped: the newest checkpoint that can be read, and clean stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_map_only

from sag_dit.checkpoints import build, write_safetensors
from sag_dit.checkpoints.export import Own, check_finite, not_finite
from sag_dit.checkpoints.formats import merged
from sag_dit.files import atomic, writing
from sag_dit.raised import reason_of
from sag_dit.training.averaging import whole_weights
from sag_dit.training.module import DiffusionModule
from sag_dit.untrusted import read_json

FOLDER = "checkpoints"
FINISHED = "finished.json"
"""Tells which step a run's weights were exported at: with the newest checkpoint's, all is done."""
ENDED = "ended_by"
"""Where a checkpoint says why an EarlyStopping has ended the run at it."""
TOLD_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Raised on every rank at the same step boundary after Ctrl-C or SIGTERM.

    Its exit code is the shell's, 130 or 143, and ``told`` says how to go on.

    Example::

        try:
            trainer.fit(module, data)
        except Stopped as stop:
            print(stop.code, stop.told)
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(128 + number)
        self.told = f"saved at step {step}; repeat the command to go on"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

    Lightning's own class keeps a second copy in memory and a third in the system's folder for
    temporary files. If that is another disk, the file is then copied instead of renamed.

    Example::

        trainer = Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint whole or not at all.

        Raises:
            OSError: there is no room, or another reason why it cannot be written.
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as temporary, temporary.open("wb") as stream:
            torch.save(checkpoint, stream)


class BestCheckpoints(ModelCheckpoint):
    """A run's own best checkpoints, whose state has a place of its own in a checkpoint.

    So it stands beside a ModelCheckpoint of the user's that watches the same number. Checkpoints
    from before have the state under the name of Lightning's class, where it is found too.

    Example::

        trainer = Trainer(callbacks=[best_checkpoint(out), ModelCheckpoint(monitor="val/loss")])
    """

    @property
    def _legacy_state_key(self) -> str:  # type: ignore[override]
        return self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


def best_checkpoint(
    out: Path,
    monitor: str = "val/loss",
    name: str = "best",
    mode: str = "min",
    every_n_steps: int | None = None,
    most: int = 1,
) -> BestCheckpoints:
    """Return a callback that keeps the ``most`` best checkpoints by what ``monitor`` logs."""
    return BestCheckpoints(
        dirpath=out / FOLDER,
        filename=f"{name}-{{step:08d}}",
        auto_insert_metric_name=False,
        monitor=monitor,
        mode=mode,
        save_top_k=most,
        every_n_train_steps=every_n_steps,
        enable_version_counter=False,
    )


class LastCheckpoints(Checkpoint):
    """Keeps the last checkpoints, saves at every orderly end, and stops all ranks together.

    It keeps two unless told otherwise, because a crash of the machine may truncate the newest. With
    ``every_n_minutes`` one is also saved when so much time has passed since the last, by the clock
    of rank 0. A checkpoint stands at the end of a step, never between accumulated gradients. If the
    step is followed by validation, the checkpoint is written after that, since a run that goes on
    from it does not validate again. If it ends what Lightning calls an epoch, it is written after
    the other callbacks' ``on_train_epoch_end``, and a run that goes on begins the next epoch.

    Orderly ends are the last step, a Trainer that is told to stop, as by ``max_time`` or at the end
    of an epoch, a loader that fails, Ctrl-C and SIGTERM. On a signal the handler only sets a flag,
    because the step may be half finished. At the end of the step all ranks save, and at the start
    of the next one they exit with 130 or 143, so that the metrics of the step are still logged. A
    second Ctrl-C ends at once.

    Raises:
        ValueError: there is no room for a checkpoint, or a loader has failed.

    Example::

        trainer = Trainer(callbacks=[LastCheckpoints(out, every_n_steps=1000)])
    """

    def __init__(
        self,
        out: Path,
        every_n_steps: int,
        keep: int = 2,
        every_n_minutes: float | None = None,
    ) -> None:
        self._folder, self._every, self._keep = out / FOLDER, every_n_steps, keep
        self._minutes, self._saved_at = every_n_minutes, time.monotonic()
        self._signal = 0
        self._ending = self._due = self._tells = self._epoch_ends = False
        self._stop: BaseException | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals in place of Lightning, and check that there is room for a checkpoint."""
        self._previous = {each: signal.signal(each, self._note) for each in TOLD_TO_STOP}
        if hasattr(signal, "SIGCHLD"):
            # torch raises there when a loader's process is killed, in the middle of a step; without
            # that the loader raises, when it is asked for the next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        check_readable({f"the callback {each.state_key}": _state_at_start(each) for each in every})
        self._folder.mkdir(parents=True, exist_ok=True)
        self._saved_at = time.monotonic()
        self._tells = trainer.is_global_zero
        for best in trainer.checkpoint_callbacks:
            if isinstance(best, BestCheckpoints):
                self._forget(best, trainer)
        if trainer.is_global_zero:
            for left in self._folder.glob(".*.tmp"):  # by a process that was killed while saving
                left.unlink()
        weights = pl_module.state_dict().values()
        need = sum(tensor.numel() * tensor.element_size() for tensor in weights)
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise ValueError(
                f"{self._folder}: {free / 1e6:,.1f} MB are free, and the weights of one checkpoint "
                f"are {need / 1e6:,.1f} MB; make room, or set out= to another disk"
            )

    @staticmethod
    def _forget(best: BestCheckpoints, trainer: Trainer) -> None:
        """Delete the worst of the best checkpoints, where the run kept more of them before."""
        kept, most = best.best_k_models, best.save_top_k
        worst_first = sorted(kept, key=lambda path: float(kept[path]), reverse=best.mode == "min")
        for path in worst_first[:-most]:
            del kept[path]
            trainer.strategy.remove_checkpoint(path)
            best.kth_best_model_path = worst_first[-most]
            best.kth_value = kept[worst_first[-most]]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise SystemExit(128 + number)
        if number == signal.SIGINT and self._tells:
            # Not by print, which may be what the signal has interrupted.
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")
        self._signal = number

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so in a checkpoint at which an EarlyStopping ends the run.

        Raises:
            ValueError: there is something in it that could not be read again.
        """
        kept = {f"the callback {key}": each for key, each in checkpoint["callbacks"].items()}
        others = {name: each for name, each in checkpoint.items() if name != "callbacks"}
        check_readable({**kept, **others})
        if trainer.should_stop and trainer.fit_loop._can_stop_early:
            stops = (each.stopping_reason_message for each in trainer.early_stopping_callbacks)
            told = next(filter(None, stops), None)
            if told is not None:
                reason = told.partition(" Signaling Trainer")[0].rstrip(".")
                checkpoint[ENDED] = f"EarlyStopping: {reason}"
        if self._epoch_ends:
            begin_next_epoch(checkpoint["loops"]["fit_loop"], trainer.global_step)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let ``max_time`` count anew at every start, so that the same command goes on."""
        checkpoint.get("callbacks", {}).pop("Timer", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if the step before was the last."""
        if self._stop is not None:
            raise self._stop

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Agree with the other ranks whether to stop, and save unless validation follows first."""
        loop = trainer.fit_loop.epoch_loop
        failed = getattr(trainer.train_dataloader, "failure", None)
        self._ending = self._ending or trainer.should_stop
        # Between accumulated gradients nothing ends, unless there is no further batch, nor before
        # ``min_steps``.
        may_end = not loop._should_accumulate() and trainer.fit_loop._can_stop_early
        trainer.should_stop = self._ending and may_end
        if loop._should_accumulate():
            self._stop = failed
            return
        step = trainer.global_step
        self._stop = self._agreed(trainer, failed)
        is_last = trainer.should_stop or 0 < trainer.max_steps <= step
        self._due = self._stop is not None or is_last or step % self._every == 0
        self._due = self._due or self._is_time(trainer)
        fetcher = trainer.fit_loop._data_fetcher
        validates = fetcher is not None and loop._should_check_val_fx(fetcher)
        if not validates and not loop._num_ready_batches_reached():
            self._save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether so many minutes have passed, as rank 0 says."""
        if self._minutes is None:
            return False
        passed = trainer.is_global_zero and time.monotonic() - self._saved_at >= 60 * self._minutes
        return bool(trainer.strategy.reduce_boolean_decision(passed, all=False))

    def _agreed(self, trainer: Trainer, failed: Exception | None) -> BaseException | None:
        """Return what all ranks raise once they have saved, None if no rank has a reason to."""
        own = failed is not None or self._signal > 0
        if not trainer.strategy.reduce_boolean_decision(own, all=False):
            return None
        # A failure comes first, which names what to mend, on whichever rank it is.
        reasons: list[int | str] = [
            reason_of(failed) if failed else self._signal
        ] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(reasons, reasons[0])
        stopped = Stopped(
            max(each for each in [0, *reasons] if isinstance(each, int)), trainer.global_step
        )
        failures = [each for each in reasons if isinstance(each, str)]
        if not failures:
            return stopped
        error = ValueError(f"{failures[0]}; {stopped.told}")
        error.__cause__ = failed  # With its frames, for whoever shows them.
        return error

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save now if the step was due, or if it became the last one by what was found."""
        self._due = self._due or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the step was due, or if a callback ends the run here, on whichever rank."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return  # The run ends within an epoch, and is saved.
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(
            trainer.should_stop, all=False
        )
        self._due = self._due or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        self._epoch_ends = True
        self._save(trainer)
        self._epoch_ends = False

    def _save(self, trainer: Trainer) -> None:
        if not self._due or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._due = False
        self._saved_at = time.monotonic()
        file = step_checkpoint(self._folder.parent, trainer.global_step)
        with writing(file):
            try:
                trainer.save_checkpoint(file)
            except CheckpointException as error:
                # Of a sharded one every rank writes a part; the first reason is told.
                raise next(iter(error.failures.values()))[0] from error
        # One of a later step could not be read when the run went on, so that it counts for none.
        for old in [each for each in steps_of(self._folder) if each <= file][self._keep :]:
            trainer.strategy.remove_checkpoint(old)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def begin_next_epoch(fit: dict[str, Any], step: int) -> None:
    """Let the progress saved at the end of an epoch's last step be that at the next one's start.

    ``fit`` is the state of Lightning's fit loop. Going on from it, no hook of the epoch that ended
    is called again, and all of the next one's are.

    Example::

        begin_next_epoch(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])
    """
    for epoch in fit["epoch_progress"].values():
        ended = epoch["ready"]
        epoch |= {"ready": ended + 1, "started": ended, "processed": ended, "completed": ended}
    batches = fit["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    batches["current"] |= dict.fromkeys(batches["current"], 0)
    # Lightning counts both up when it goes on, as after any other step.
    for each in (batches["current"], batches["total"]):
        each["completed"] = each["ready"] - 1
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


def _state_at_start(callback: Callback) -> dict[str, Any]:
    """Return the state of a callback, nothing where it has none before the first step."""
    try:
        return callback.state_dict()
    except Exception:  # Whatever a mean of no steps may be.
        return {}


def check_readable(parts: Mapping[str, Any]) -> None:
    """Refuse to save what could not be read again, since nothing in a checkpoint is unpickled.

    Raises:
        ValueError: the part, by its name, and why.

    Example:
        >>> check_readable({"the callback Mine": {"seen": 3, "mean": torch.zeros(2)}})
    """
    for name, part in parts.items():
        bare = tree_map_only(torch.Tensor, lambda _: None, part)
        file = BytesIO()
        try:
            torch.save(bare, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = found[1] if found else f"{error}".partition("\n")[0]
            raise ValueError(
                f"{name} keeps in checkpoints what cannot be read again ({reason}): expected "
                f"tensors, numbers, text, and lists and dicts of them"
            ) from None


def step_checkpoint(out: Path, step: int) -> Path:
    """Return the checkpoint of a run's step."""
    return out / FOLDER / f"step-{step:08d}.ckpt"


def steps_of(folder: Path) -> list[Path]:
    """Return the checkpoints of steps in a folder, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def export_run(trainer: Trainer, module: DiffusionModule, out: Path) -> None:
    """Write the weights that are to be sampled with as safetensors; all ranks take part.

    Sharded weights are gathered one at a time; rank 0 writes.

    Raises:
        ValueError: weights are NaN or infinite; the newest checkpoint whose are not is named.
    """
    state = whole_weights(trainer, module.evaluated)
    if not trainer.is_global_zero:
        return
    description = module.model.description
    if "lora" in description:
        state = merged(state, description["lora"])
    if not_finite(state):
        check_finite(state, str(out), _last_good(out))
    denoiser = build(description)
    denoiser.network.load_state_dict(state)
    extra: dict[str, Any] = {
        key: description[key] for key in ("defaults", "vae") if key in description
    }
    write_safetensors(out, denoiser, extra)
    with atomic(out / FINISHED) as temporary:
        temporary.write_text(json.dumps({"step": trainer.global_step}), encoding="utf-8")


def exported_step(out: Path) -> int | None:
    """Return the step whose weights a run has exported last, None if it is not known."""
    try:
        step = read_json(out / FINISHED)["step"]
    except (ValueError, KeyError):
        return None
    return step if isinstance(step, int) and (out / Own.weights).is_file() else None


def _last_good(out: Path) -> str:
    """Return what to do when the last weights are of no use."""
    newest = sorted((out / FOLDER).glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    for checkpoint in reversed(newest):
        state = (_read(checkpoint) or {}).get("state_dict", {})
        if state and not not_finite(state):
            return (
                f"the newest checkpoint without is {checkpoint}: draw from it or go on "
                f"from it by ckpt={checkpoint}, with a smaller optimizer.lr"
            )
    return (
        "no checkpoint of this run is without such values: train anew, with a smaller optimizer.lr"
    )


def newest_checkpoint(out: Path, module: LightningModule) -> tuple[Path | None, int]:
    """Return the newest checkpoint of a run that can be read, and its step; None and 0 if none can.

    Raises:
        ValueError: it is not one of this module.
    """
    for checkpoint in steps_of(out / FOLDER):
        state = _read(checkpoint)
        if state is not None:
            _check_fits(checkpoint, state.get("state_dict"), module)
            return checkpoint, int(state["global_step"])
    return None, 0


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or warn and return None; of a sharded one, a folder, all but tensors."""
    try:
        if checkpoint.is_dir() and not (checkpoint / ".metadata").is_file():
            raise FileNotFoundError(".metadata, which is written last")
        file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
        # The list of contents is at the end of a file; the tensors themselves are not read yet.
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return state
    except Exception as error:
        warnings.warn(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}) and is passed over; "
            f"training goes on from the checkpoint before it, or anew if there is none",
            stacklevel=2,
        )
        return None


def ended_by(checkpoint: Path) -> str | None:
    """Return why an EarlyStopping ended the run at a checkpoint, None if none did."""
    told = (_read(checkpoint) or {}).get(ENDED) if checkpoint.exists() else None
    return told if isinstance(told, str) else None


def _check_fits(
    checkpoint: Path, state: Mapping[str, torch.Tensor] | None, module: LightningModule
) -> None:
    if state is None:  # sharded: what reads the tensors compares them
        return
    here, there = (
        {name: tuple(tensor.shape) for name, tensor in each.items()}
        for each in (module.state_dict(), state)
    )
    differing = sorted(name for name in here | there if here.get(name) != there.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} is of another model: {len(differing)} tensors differ, the first is "
            f"{name}, there {there.get(name, 'missing')} and here {here.get(name, 'missing')}; "
            f"choose another out, or take the checkpoint away"
        )
