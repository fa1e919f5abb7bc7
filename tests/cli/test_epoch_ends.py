"""A run that is stopped at the end of what Lightning calls an epoch is saved, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sag_dit.cli.train import early_end_report
from tests.cli.conftest import rows

Command = Callable[..., Any]

SMALL = (
    "experiment=digits",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "data.batch_size=32",
    "trainer.accelerator=cpu",
    "every_n_steps.log=1",
    "every_n_steps.validation=3",
    "keep.best=0",
)

OWN = """
from lightning.pytorch import Callback

STOPS = 0


class Epochs(Callback):
    '''Counts the epochs that begin and end, and stops at the end of one where it is told.'''

    def __init__(self):
        self.begun = self.ended = 0

    def state_dict(self):
        return {"begun": self.begun, "ended": self.ended}

    def load_state_dict(self, state):
        self.begun, self.ended = state["begun"], state["ended"]

    def on_train_epoch_start(self, trainer, pl_module):
        self.begun += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("begun", float(self.begun))
        pl_module.log("ended", float(self.ended))
        pl_module.log("epoch_is", float(trainer.current_epoch))
        pl_module.log("place", float(batch_idx))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended += 1
        trainer.should_stop = trainer.global_step == STOPS and trainer.is_global_zero


class Stops(Callback):
    '''Lets no step be trained.'''

    def on_train_start(self, trainer, pl_module):
        trainer.should_stop = True
"""
EPOCHS = "trainer.callbacks=[{_target_: my_epochs.Epochs}]"
EARLY = (
    "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, "
    "check_on_train_epoch_end: true, patience: 1, min_delta: 5}]"
)


@pytest.fixture
def train(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    (tmp_path / "my_epochs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*arguments: str) -> Any:
        outcome = in_process("train", *SMALL, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


def assert_alike(one: str, other: str) -> None:
    here, there = (load_file(f"{out}/model.safetensors") for out in (one, other))
    assert [name for name in there if not torch.equal(here[name], there[name])] == []
    assert rows(one) == rows(other)
    states = (torch.load(f"{out}/checkpoints/step-00000008.ckpt") for out in (one, other))
    left, right = (each["callbacks"]["Epochs"] for each in states)
    assert left == right


@pytest.mark.parametrize(
    ("length", "each", "stops"), [(2, 1, 2), (3, 1, 3), (4, 2, 4)], ids=["", "validated", "parts"]
)
@pytest.mark.parametrize("every", [1, 100])
def test_a_run_goes_on_where_a_callback_ended_it(
    length: int, each: int, stops: int, every: int, train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step without and with validation, of parts, saved anyway or for the end alone."""
    settings = (
        f"trainer.limit_train_batches={length}",
        f"trainer.accumulate_grad_batches={each}",
        f"every_n_steps.checkpoint={every}",
        "max_steps=8",
        EPOCHS,
    )
    train(*settings, "out=whole")
    assert [row["begun"] for row in rows("whole") if "begun" in row][-1] != "1.0"
    import my_epochs  # type: ignore[import-not-found]

    with monkeypatch.context() as told:
        told.setattr(my_epochs, "STOPS", stops)
        outcome = train(*settings, "out=parts")
    assert f"saved at step {stops} of 8" in outcome.out
    train(*settings, "out=parts")
    assert_alike("parts", "whole")


def test_a_longer_run_goes_on_where_an_epoch_ended(train: Command) -> None:
    settings = ("trainer.limit_train_batches=2", EPOCHS)
    train(*settings, "max_steps=8", "out=whole")
    for steps in (4, 8):
        train(*settings, f"max_steps={steps}", "out=longer")
    assert_alike("longer", "whole")


@pytest.mark.parametrize(
    "length",
    [
        2,
        # Three steps, of which the second is saved before.
        3,
    ],
)
def test_a_run_that_early_stopping_ends_at_an_epochs_end_is_finished(
    length: int, train: Command
) -> None:
    settings = (f"trainer.limit_train_batches={length}", "every_n_steps.checkpoint=2", EARLY)
    outcome = train(*settings, "max_steps=12", "out=run")
    step = 2 * length
    assert f"finished at step {step} of 12: EarlyStopping: Monitored metric" in outcome.out
    assert (
        f"finished at step {step} (EarlyStopping" in train(*settings, "max_steps=12", "out=run").out
    )


def test_a_run_that_is_stopped_before_its_first_step_says_so(train: Command) -> None:
    outcome = train("max_steps=4", "out=run", "trainer.callbacks=[{_target_: my_epochs.Stops}]")
    assert "ended unsaved at step 0 of 4" in outcome.out
    assert early_end_report(Path("run"), 0, 4).startswith("ended unsaved")
