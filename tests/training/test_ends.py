"""Every orderly end of training leaves a checkpoint to go on from, to the same weights."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import Dataset

from sag_dit.data.digits import Digits
from sag_dit.data.training_batches import TrainingLoader, as_it_is
from sag_dit.training.module import DiffusionModule
from sag_dit.training.resume import LastCheckpoints, Stopped, newest_checkpoint
from tests.training.making import ADAM, fresh_model, make_trainer

RARELY = 1000


class At(Callback):
    """Does something at the end of a batch, counted from 1."""

    def __init__(self, batch: int, what: Callable[[Trainer], Any]) -> None:
        self._batch, self._what = batch, what

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self._batch:
            self._what(trainer)


def train(
    out: Path, steps: int, *callbacks: Callback, data: Digits | None = None, **options: Any
) -> dict[str, Any]:
    """Train, going on from what is there; return the module's state."""
    module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.5)
    checkpoint, _ = newest_checkpoint(out, module)
    trainer = make_trainer(out, steps, [*callbacks, LastCheckpoints(out, RARELY)], **options)
    data = data or Digits(8)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return dict(module.state_dict())


def saved(out: Path) -> list[int]:
    return [int(each.stem[5:]) for each in sorted((out / "checkpoints").glob("step-*.ckpt"))]


def assert_goes_on(out: Path, steps: int, **options: Any) -> None:
    """The weights are those of a run that was never ended."""
    there = train(out, steps, **options)
    whole = train(out.with_name(f"{out.name}-whole"), steps, **options)
    assert [name for name in whole if not torch.equal(whole[name], there[name])] == []


@pytest.fixture
def handlers() -> Any:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield before
    assert {each: signal.getsignal(each) for each in before} == before


def ask_to_stop(trainer: Trainer) -> None:
    trainer.should_stop = True


def test_a_trainer_that_is_told_to_stop_goes_on_to_its_least_step(tmp_path: Path) -> None:
    """It saves where it ends, not at every step since it was told."""
    steps: list[int] = []
    save = LastCheckpoints._save

    def counting(self: Any, trainer: Trainer) -> None:
        steps.extend([trainer.global_step] * self._due)
        save(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoints, "_save", counting)
        train(tmp_path / "run", 8, At(1, ask_to_stop), min_steps=4, min_epochs=0)
    assert steps == [4] and saved(tmp_path / "run") == [4]


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_a_trainer_that_is_told_to_stop_ends_a_step(tmp_path: Path, batch: int) -> None:
    """Of three batches each; the gradients of the first two of a step are nothing to save."""
    out, options = tmp_path / "run", {"accumulate_grad_batches": 3}
    train(out, 5, At(batch, ask_to_stop), **options)
    assert saved(out) == [2]
    assert_goes_on(out, 4, **options)
    assert saved(out) == [2, 4]


@pytest.mark.filterwarnings("ignore:.*is passed over")
def test_checkpoints_that_cannot_be_read_push_none_out(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, 5, At(3, ask_to_stop))
    train(out, 5)
    for each in (out / "checkpoints").glob("step-*.ckpt"):
        each.write_bytes(b"cut short")
    train(out, 5, At(2, ask_to_stop))
    assert saved(out) == [2, 3, 5], "the one that was just saved is the only one there is"
    assert_goes_on(out, 5)


def test_max_time_ends_with_a_checkpoint_and_counts_anew(tmp_path: Path) -> None:
    out, limit = tmp_path / "run", {"max_time": {"hours": 1}}

    def an_hour_later(trainer: Trainer) -> None:
        timer = next(each for each in trainer.callbacks if type(each).__name__ == "Timer")
        timer._offset += 3600  # type: ignore[attr-defined]

    train(out, 5, At(2, an_hour_later), **limit)
    assert saved(out) == [2]
    train(out, 5, **limit)
    assert saved(out) == [2, 5]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_step(
    tmp_path: Path, handlers: Any, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped) as stop:
        train(out, 5, At(2, lambda _: os.kill(os.getpid(), number)))
    assert (stop.value.code, stop.value.told) == (
        code,
        "saved at step 2; repeat the command to go on",
    )
    assert saved(out) == [2]
    assert_goes_on(out, 4)


def test_a_second_interrupt_does_not_wait(tmp_path: Path, handlers: Any) -> None:
    def twice(_: Trainer) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", 5, At(2, twice))
    assert stop.value.code == 130
    assert saved(tmp_path / "run") == []


class Faulty(Dataset[Any]):
    """Digits that fail at a step."""

    def __init__(self, inner: Any, step: int, error: Exception) -> None:
        self._inner, self._step, self._error = inner, step, error

    def __getitems__(self, batch: Any) -> Any:
        if batch.step == self._step:
            raise self._error
        return self._inner.__getitems__(batch)


class FaultyDigits(Digits):
    """Batches of which one cannot be had."""

    def __init__(self, step: int, error: Exception, workers: int = 0) -> None:
        super().__init__(8)
        self.workers = workers
        self._step, self._error = step, error

    @property
    def dataset(self) -> Any:
        return Faulty(super().dataset, self._step, self._error)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ValueError("a.png: gone\n  so is b.png"), OSError(5, "EIO")])
def test_a_loader_that_fails_ends_a_step(tmp_path: Path, workers: int, error: Exception) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError) as told:
        train(out, 5, data=FaultyDigits(3, error, workers))
    assert str(error).splitlines()[0] in str(told.value)
    assert "Traceback" not in str(told.value) and "Caught" not in str(told.value)
    (step,) = saved(out)
    assert str(told.value).endswith(f"; saved at step {step}; repeat the command to go on")
    assert step > 0
    assert_goes_on(out, 5)


def test_between_accumulated_gradients_nothing_is_saved(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 4}
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"^gone$"):
        train(out, 3, data=FaultyDigits(6, ValueError("gone")), **options)
    assert saved(out) == []


def test_our_own_mistakes_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="oops"):
        train(tmp_path / "run", 3, data=FaultyDigits(0, TypeError("oops")))


def test_a_first_batch_that_fails_is_told_in_a_sentence() -> None:
    faulty = FaultyDigits(0, ValueError("a.png: gone"), workers=1)
    with pytest.raises(ValueError, match=r"^a\.png: gone$"):
        next(iter(faulty.train_dataloader()))


class Dying(Dataset[Any]):
    """Its process is killed at the third batch."""

    def __getitem__(self, index: int) -> int:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.slow
def test_a_loader_process_that_is_killed_is_told() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    try:
        loader = TrainingLoader(
            Dying(), sampler=range(9), batch_size=None, num_workers=1, collate_fn=as_it_is
        )
        batches = iter(loader)
        next(batches)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as LastCheckpoints does
        found = [next(batches) for _ in range(3)]
        assert found[-1] == found[-2] < 2
        assert "was killed, often for want of memory; data.workers=N" in str(loader.failure)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_full_disk_is_told_of_sharded_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own error of these is none that programs catch, and hides what the ranks met."""

    def full(*_: Any) -> None:
        reason = OSError(errno.ENOSPC, "No space left on device")
        raise CheckpointException("write", {0: (reason, StackSummary())})

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"step-00000002\.ckpt could not be written \(No space left"):
        train(tmp_path / "run", 2)
