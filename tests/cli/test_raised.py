"""A user's code that raises while a run trains: what failed, at which step, and what is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import TINY
from tests.training.making import assert_same

Command = Callable[..., Any]

SMALL = (
    *TINY,
    "every_n_steps.checkpoint=2",
    "max_steps=5",
    "trainer.accelerator=cpu",
)
MINE = '''
import os
import signal
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from sag_dit.training.objective import MSE

MENDED = Path("mended")


class Fails(Callback):
    def __init__(self, kind="RuntimeError", rank=0):
        self.kind, self.rank = kind, rank

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3 and trainer.global_rank == self.rank and not MENDED.exists():
            self.fail()

    def fail(self):
        raise __builtins__[self.kind]("it is broken")


class Takes(Callback):
    def on_train_batch_end(self, trainer):
        pass


class Objective(MSE):
    seen = 0

    def __call__(self, *args, **options):
        self.seen += 1
        if self.seen == 4:
            raise TypeError("it is broken")
        return super().__call__(*args, **options)


class Steps(torch.optim.SGD):
    seen = 0

    def step(self, closure=None):
        self.seen += 1
        if self.seen == 4:
            raise IndexError("it is broken")
        return super().step(closure)


class Writes(Logger):
    name = version = "mine"

    def log_hyperparams(self, *_, **__): ...

    def log_metrics(self, metrics, step=None):
        if step == 2:
            raise RuntimeError("it is broken")


class Logs(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.log("my/losses", pl_module.last_losses.per_image)


class Keeps(Callback):
    def state_dict(self):
        return {"mean": np.float64(0.5)}


class Stops(Callback):
    def __init__(self, how):
        self.how = how

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != 3:
            return
        if self.how == "should_stop":
            trainer.should_stop = True
        if self.how in ("SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.how))
        if self.how in ("RuntimeError", "KeyboardInterrupt", "SystemExit"):
            raise __builtins__[self.how](3)


class Hears(Callback):
    """Prints which of the hooks at the end are called."""

    def on_train_end(self, *_):
        print("hook on_train_end")

    def on_fit_end(self, *_):
        print("hook on_fit_end")

    def teardown(self, *_, **__):
        print("hook teardown")

    def on_exception(self, trainer, pl_module, exception):
        print("hook on_exception", type(exception).__name__)
'''


@pytest.fixture
def train(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Train in ``run`` with what a user has written in ``mine.py``."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return lambda *arguments: in_process("train", *SMALL, "out=run", *arguments)


def callback(name: str, **options: str) -> str:
    told = "".join(f", {key}: {value}" for key, value in options.items())
    return f"trainer.callbacks=[{{_target_: mine.{name}{told}}}]"


AFTER = "failed after step 3; the newest checkpoint is run/checkpoints/step-00000002.ckpt, from"
RAISING = {
    callback("Fails"): r"Fails.on_train_batch_end \(mine.py, line \d+\)",
    "objective._target_=mine.Objective": r"Objective.__call__ \(mine.py, line \d+\)",
    "optimizer._target_=mine.Steps": r"Steps.step \(mine.py, line \d+\)",
    "trainer.logger=[{_target_: mine.Writes}]": r"Writes.log_metrics \(mine.py, line \d+\)",
}


@pytest.mark.parametrize("part", RAISING)
def test_the_traceback_is_his_and_a_line_says_what_is_kept(part: str, train: Command) -> None:
    outcome = train(part)
    assert outcome.code == 1
    told = outcome.err.split("Traceback (most recent call last):\n")[1]
    assert re.match(r'  File ".*mine.py", line \d+', told), "it begins with his code"
    assert "it is broken" in told and "lightning" not in told
    last = outcome.err.splitlines()[-1]
    assert re.match(f"error: {RAISING[part]} {AFTER}", last), last


def test_the_same_command_goes_on_once_it_is_mended(train: Command, tmp_path: Path) -> None:
    assert train(callback("Fails")).code == 1
    (tmp_path / "mended").touch()
    assert train(callback("Fails")).code == 0
    parts = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run").rename(tmp_path / "before")
    assert train(callback("Fails")).code == 0
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), parts)


@pytest.mark.parametrize("kind", ["ValueError", "OSError"])
def test_misuse_keeps_its_one_sentence(kind: str, train: Command) -> None:
    outcome = train(callback("Fails", kind=kind))
    assert outcome.code == 1 and "Traceback" not in outcome.err
    expected = rf"error: it is broken; Fails.on_train_batch_end \(mine.py, line \d+\) {AFTER}"
    assert re.search(expected, outcome.err)


def test_before_the_first_checkpoint_it_says_that_a_run_begins_anew(train: Command) -> None:
    outcome = train(callback("Fails"), "every_n_steps.checkpoint=4")
    assert outcome.err.endswith("before there was a checkpoint: the same command begins anew\n")


def test_a_hook_that_takes_other_arguments_is_named(train: Command) -> None:
    outcome = train(callback("Takes"))
    assert "TypeError: Takes.on_train_batch_end() takes" in outcome.err
    assert outcome.err.count('  File "') == 1, "only the call"
    assert "\nerror: Takes.on_train_batch_end failed after step 1, before" in outcome.err


def test_what_is_no_number_is_refused_with_its_name_and_shape(train: Command) -> None:
    outcome = train(callback("Logs"))
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "logging my/losses: Tensor of shape (8,); expected one number" in outcome.err


def test_a_state_that_could_not_be_read_again_is_refused_before_the_first_step(
    train: Command,
) -> None:
    outcome = train(callback("Keeps"))
    assert outcome.code == 1 and "step 1" not in outcome.err
    assert "the callback Keeps keeps in checkpoints what cannot be read again" in outcome.err
    assert "scalar" in outcome.err


ENDS = {
    "": "on_train_end on_fit_end teardown",
    "should_stop": "on_train_end on_fit_end teardown",
    "SIGINT": "on_exception Stopped",
    "SIGTERM": "on_exception Stopped",
    "RuntimeError": "on_exception RuntimeError",
    "SystemExit": "on_exception SystemExit",
    "KeyboardInterrupt": "on_exception KeyboardInterrupt",
}


@pytest.mark.parametrize("how", ENDS)
def test_hooks_at_the_end_are_those_that_the_page_says(how: str, train: Command) -> None:
    both = f"{{_target_: mine.Hears}}, {{_target_: mine.Stops, how: '{how}'}}"
    outcome = train(f"trainer.callbacks=[{both}]")
    heard = [line[5:] for line in outcome.out.splitlines() if line.startswith("hook ")]
    assert " ".join(heard) == ENDS[how]
    if how in ("SystemExit", "KeyboardInterrupt"):
        assert re.search(
            r"stopped: Stops.on_train_batch_end \(mine.py, line \d+\) has stopped after step 3; "
            r"the newest checkpoint is run/checkpoints/step-00000002.ckpt, from which",
            outcome.err,
        )


@pytest.mark.slow  # two processes, which import for some seconds each
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_ends_too(in_other_process: Command, tmp_path: Path, rank: int) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    outcome = in_other_process(
        *SMALL,
        "out=run",
        callback("Fails", rank=str(rank)),
        "trainer=ddp",
        "trainer.devices=2",
        script="train.py",
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}",
    )
    assert outcome.code == 1 and not outcome.outlived
    assert "error: Fails.on_train_batch_end (mine.py, line " in outcome.err
    assert AFTER in outcome.err
