"""EarlyStopping, ModelCheckpoint and loggers of the user's: refused early, told, gone on with."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from sag_dit.data.digits import Digits
from sag_dit.training.callbacks import LossByLevel, Monitored, Speed, check_monitors, strange_hooks
from sag_dit.training.console import Lines
from sag_dit.training.loggers import CSVLog, check_one_number, note_versions
from sag_dit.training.module import DiffusionModule
from sag_dit.training.resume import check_readable
from tests.cli.conftest import TINY
from tests.training.making import ADAM, assert_same, fresh_model, make_trainer

Command = Callable[..., Any]

SMALL = (
    *TINY,
    "every_n_steps.checkpoint=2",
    "trainer.accelerator=cpu",
)
STOPS = (
    "max_steps=6",
    "every_n_steps.validation=1",
    "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, "
    "min_delta: 10.0, patience: 2}]",
)
NEVER = "every_n_steps.validation=9: expected at most max_steps=5"


class Own(Callback):
    """Stands for a callback of the user's, which may log anything."""


@pytest.mark.parametrize(
    ("callback", "why", "told"),
    [
        (EarlyStopping("val_loss"), None, "Did you mean val/loss?"),
        (EarlyStopping("metrics/fid"), None, "which nothing logs; expected one of images/s, "),
        (ModelCheckpoint(monitor="val_loss"), None, "Did you mean val/loss?"),
        (ModelCheckpoint(monitor="loss", every_n_train_steps=2), None, "which nothing logs"),
        (EarlyStopping("val/loss"), NEVER, f"monitors val/loss at validations, but {NEVER}"),
        (EarlyStopping("train/loss"), NEVER, f"monitors train/loss at validations, but {NEVER}"),
        (ModelCheckpoint(), NEVER, f"ModelCheckpoint saves at validations, but {NEVER}"),
        (
            ModelCheckpoint(monitor="val/loss", every_n_train_steps=2),
            NEVER,
            "monitors val/loss at validations",
        ),
    ],
)
def test_what_would_wait_in_vain_is_refused(callback: Callback, why: Any, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_monitors([Speed(1), LossByLevel(1), callback], why)
    assert f"trainer.callbacks: {type(callback).__name__} " in str(refused.value)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "callbacks",
    [
        [EarlyStopping("val/loss")],
        [EarlyStopping("train/part_of_a_loss")],
        [LossByLevel(1), EarlyStopping("loss_by_level/4_of_4")],
        [EarlyStopping("what/I_log"), Own()],
        [EarlyStopping("lr-AdamW"), LearningRateMonitor()],
        [EarlyStopping("val_loss", strict=False)],
        [ModelCheckpoint()],
    ],
)
def test_what_may_be_logged_is_not_refused(callbacks: list[Callback]) -> None:
    check_monitors(callbacks, None)
    check_monitors([ModelCheckpoint(every_n_train_steps=2)], NEVER)


def test_what_a_run_has_never_logged_is_told_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = ModelCheckpoint(tmp_path, monitor="train_loss", every_n_train_steps=1)
    module = DiffusionModule(fresh_model(), optimizer=ADAM)
    make_trainer(tmp_path, 2, [Monitored(), saves, Own()]).fit(module, datamodule=Digits(8))
    told = capsys.readouterr().err
    assert "ModelCheckpoint monitors train_loss, which nothing has logged" in told
    assert "Did you mean train/loss?" in told


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_the_command_refuses_before_there_is_a_folder(
    name: str, in_process: Command, tmp_path: Path
) -> None:
    one = f"{{_target_: lightning.pytorch.callbacks.{name}, monitor: val_loss}}"
    for validation, told in ((1, "Did you mean val/loss?"), (9, "expected at most max_steps=5")):
        outcome = in_process(
            "train",
            *SMALL,
            "out=run",
            "max_steps=5",
            f"every_n_steps.validation={validation}",
            f"trainer.callbacks=[{one}]",
        )
        assert outcome.code == 1 and "Traceback" not in outcome.err and told in outcome.err
        assert not (tmp_path / "run").exists()


def test_a_run_that_early_stopping_ends_is_finished(in_process: Command, tmp_path: Path) -> None:
    why = "EarlyStopping: Monitored metric val/loss did not improve in the last 2 records"
    first = in_process("train", *SMALL, *STOPS, "out=run")
    assert first.code == 0, first.err
    assert f"finished at step 3 of 6: {why}" in first.out
    weights = load_file(tmp_path / "run" / "model.safetensors")
    # The same command, also where the one before was killed before it wrote the weights.
    for file in ("", "finished.json"):
        if file:
            (tmp_path / "run" / file).unlink()
            (tmp_path / "run" / "model.safetensors").unlink()
        again = in_process("train", *SMALL, *STOPS, "out=run")
        assert again.code == 0 and f"finished at step 3{' of 6: ' if file else ' ('}{why}" in (
            again.out
        )
        assert_same(load_file(tmp_path / "run" / "model.safetensors"), weights)
    # A run that goes on from it is not ended by what ended the first.
    begun = in_process("train", *SMALL, *STOPS, "out=next", "resume_from=run")
    assert "callbacks that start with a fresh state: EarlyStopping" in begun.out
    assert (
        "finished" not in begun.out and (tmp_path / "next/checkpoints/step-00000006.ckpt").exists()
    )


def test_images_are_drawn_from_a_checkpoint_of_ones_own(
    in_process: Command, tmp_path: Path
) -> None:
    mine = (
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: mine, "
        "every_n_train_steps: 2, filename: '{step}'}]"
    )
    assert in_process("train", *SMALL, "out=run", "max_steps=3", mine).code == 0
    drawn = [
        in_process("sample", f"ckpt={each}", "num_images=1", "steps=2", f"out=of{place}")
        for place, each in enumerate(("mine/step=2.ckpt", "run/checkpoints/step-00000002.ckpt"))
    ]
    assert all(each.code == 0 for each in drawn), drawn[0].err
    files = [next((tmp_path / f"of{place}").glob("images/*.png")).read_bytes() for place in (0, 1)]
    assert files[0] == files[1]


def log_to(name: str) -> str:
    kind = f"lightning.pytorch.loggers.{name}"
    return f"trainer.logger=[{{_target_: {kind}, save_dir: log}}]"


def test_a_tensorboard_of_ones_own_goes_on_with_its_log(
    in_process: Command, tmp_path: Path
) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    other = tmp_path / "log" / "lightning_logs" / "version_0"
    other.mkdir(parents=True)
    for steps in (2, 3):
        done = in_process(
            "train", *SMALL, "out=run", f"max_steps={steps}", log_to("TensorBoardLogger")
        )
        assert done.code == 0 and "begins another log" not in done.out
    assert sorted(each.name for each in other.parent.iterdir()) == ["version_0", "version_1"]
    log = reading.EventAccumulator(str(other.parent / "version_1")).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1, 2]


def test_mlflow_goes_on_with_its_run(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    kind = "lightning.pytorch.loggers.MLFlowLogger"
    for steps in (2, 3):
        mine = f"trainer.logger=[{{_target_: {kind}, tracking_uri: 'file:{tmp_path}/ml'}}]"
        done = in_process("train", *SMALL, "out=run", f"max_steps={steps}", mine)
        assert done.code == 0, done.err
    (losses,) = (tmp_path / "ml").glob("*/*/metrics/train/loss")
    assert [line.split()[2] for line in losses.read_text().splitlines()] == ["0", "1", "2"]


def test_a_log_that_is_left_is_found(tmp_path: Path) -> None:
    def noted(name: str, version: int | str) -> list[str]:
        log = CSVLogger(tmp_path, version=version)
        return note_versions(tmp_path, {name: log, "own": CSVLog(tmp_path)})

    assert noted("a.B", 1) == noted("a.B", 1) == noted("a.Other", "two") == []
    assert noted("a.Other", 3) == ["a.Other"] and noted("a.B", 1) == []


def test_loggers_go_on_with_their_own_logs_in_another_order(
    in_process: Command, tmp_path: Path
) -> None:
    """Two of the same settings count as one after the other."""
    pytest.importorskip("tensorboard")
    kind = "_target_: lightning.pytorch.loggers.TensorBoardLogger"
    one, other = (f"{{{kind}, save_dir: {name}}}" for name in ("one", "other"))
    (tmp_path / "one" / "lightning_logs" / "version_4").mkdir(parents=True)
    for steps, listed in ((2, (one, other, other)), (3, (other, one, other))):
        mine = f"trainer.logger=[{','.join(listed)}]"
        done = in_process("train", *SMALL, "out=run", f"max_steps={steps}", mine)
        assert done.code == 0, done.err
        assert "begins another log" not in done.out
    logs = {each.parent for each in tmp_path.glob("o*/lightning_logs/*/events*")}
    found = sorted(f"{each.relative_to(tmp_path)}" for each in logs)
    twins = [f"other/lightning_logs/version_{number}" for number in (0, 1)]
    assert found == ["one/lightning_logs/version_5", *twins]


def test_a_logger_that_begins_anew_is_told(in_process: Command) -> None:
    line = "trainer.logger[0]: CSVLogger begins another log at each start"
    for steps, told in ((2, False), (3, True)):
        done = in_process("train", *SMALL, "out=run", f"max_steps={steps}", log_to("CSVLogger"))
        assert done.code == 0 and (line in done.out) is told


def test_a_method_that_looks_like_a_hook_is_told() -> None:
    class Mine(Callback):
        def on_train_batch_finish(self, *_: Any) -> None: ...

        def on_paper(self) -> None: ...

        def on_train_end(self, *_: Any) -> None: ...

    told = "nothing calls Mine.on_train_batch_finish; did you mean on_train_batch_"
    (line,) = strange_hooks(Mine())
    assert line.startswith(told)


class Once(Callback):
    """Logs a number at the second step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            pl_module.log("my/once", 7.0)


class Hears(CSVLog):
    """Keeps what every logger is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[tuple[Any, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("every", [1, 3])
def test_a_number_stands_in_one_row_alone(tmp_path: Path, every: int) -> None:
    class Levels(LossByLevel):
        """Has images of one level at its second entry, and of another at all others."""

        def _over_ranks(self) -> torch.Tensor:
            self.entry = getattr(self, "entry", 0) + 1
            return torch.eye(4)[[2, 2] if self.entry == 2 else [0, 0]]

    log = Hears(tmp_path)
    module = DiffusionModule(fresh_model(), optimizer=ADAM)
    make_trainer(tmp_path, 9, [Once(), Levels(every)], logger=log, log_every_n_steps=every).fit(
        module, datamodule=Digits(8)
    )
    # Logged at a step without a row it stands in the next one.
    assert [step for step, row in log.seen if "my/once" in row] == [1 if every == 1 else 2]
    levels = [[n[-6] for n in row if n.startswith("loss_by_level")] for _, row in log.seen]
    assert levels == [["3"] if place == 1 else ["1"] for place in range(9 // every)]
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert sum(bool(row["my/once"]) for row in rows) == 1 and all(row["train/loss"] for row in rows)


def test_what_lightning_s_callbacks_log_themselves_is_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = DiffusionModule(fresh_model(), optimizer=ADAM)
    watch = [DeviceStatsMonitor(cpu_stats=True), LearningRateMonitor()]
    trainer = make_trainer(tmp_path, 2, watch, logger=CSVLog(tmp_path), log_every_n_steps=1)
    trainer.loggers = [*trainer.loggers, Lines(trainer)]
    trainer.fit(module, datamodule=Digits(8))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all(": loss " in line for line in lines)


@pytest.mark.parametrize("value", [torch.ones(3), "text", None, {"a": 1.0}, torch.ones(0), 1j])
def test_one_number_is_logged_at_a_time(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^logging my/metric: .*; expected one number"):
        check_one_number("my/metric", value)
    for single in (1, 0.5, True, torch.ones(()), torch.ones(1, 1), torch.tensor(3)):
        check_one_number("my/metric", single)


@pytest.mark.parametrize("value", [Path("x"), lambda: 1, Own()])
def test_what_cannot_be_read_again_is_not_saved(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^the callback Mine keeps in checkpoints what cannot"):
        check_readable({"the callback Mine": {"kept": [value]}})
    check_readable({"the callback Mine": {"kept": [torch.ones(2), 1, "a", None, (2.0, {3: True})]}})
