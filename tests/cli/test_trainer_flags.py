"""Every argument of Lightning's Trainer acts, or is refused with the reason."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from sag_dit.cli.composing import compose
from sag_dit.cli.trainer import check_share
from sag_dit.cli.trainer_flags import DRAWS, OF_DRAWING, OF_TRAINING, check_drawing, check_training
from sag_dit.data.digits import Digits
from sag_dit.training.module import DiffusionModule
from sag_dit.training.resume import LastCheckpoints, newest_checkpoint
from tests.cli.conftest import TINY
from tests.training.making import ADAM, assert_same, fresh_model, make_trainer, state

Command = Callable[..., Any]

SMALL = (
    *TINY,
    "max_steps=2",
)


class Keeps(Callback):
    """Keeps something in checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}


class Tells(Callback):
    """Prints how many batches it has seen; stands for a callback of a user's."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"{self.name} saw {self.seen}")


class Labels(Callback):
    """Keeps the labels of every batch."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self.seen.append(batch[1].tolist())


def test_the_tables_name_arguments_of_the_trainer() -> None:
    taken = signature(Trainer).parameters.keys()
    assert {*OF_TRAINING, *OF_DRAWING, *DRAWS} <= taken
    assert not {*OF_DRAWING} & {*DRAWS}


@pytest.mark.parametrize("name", sorted(OF_TRAINING))
def test_training_refuses_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.{name}=3: \w+"):
        check_training({"devices": 1, name: 3}, max_steps=9)
    check_training({name: None}, max_steps=9)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"min_steps": 10}, "trainer.min_steps=10: expected 0 to max_steps=9"),
        ({"min_steps": -1}, "trainer.min_steps=-1: expected 0 to max_steps=9"),
        (
            {"gradient_clip_algorithm": "value"},
            "nothing is clipped without trainer.gradient",
        ),
        ({"strategy": "ddp_spawn"}, "each rank is a command of its own here: expected ddp"),
    ],
)
def test_training_refuses_what_would_act_on_nothing(stated: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        check_training(stated, max_steps=9)


@pytest.mark.parametrize("name", sorted(signature(Trainer).parameters.keys() - {*DRAWS}))
def test_drawing_refuses_what_only_training_follows(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.{name}=3: \w+"):
        check_drawing({"devices": 1, name: 3})
    check_drawing({name: None})


def test_a_trainer_of_ones_own_may_take_more() -> None:
    check_drawing({"_target_": "mine.Trainer", "pause": 3})


@pytest.mark.parametrize("command", ["sample", "evaluate", "train"])
def test_no_experiment_states_what_is_refused(command: str) -> None:
    arguments = ["experiment=digits"] if command == "train" else []
    stated = compose(command, arguments).trainer
    if command == "train":
        check_training(stated, max_steps=9)
    else:
        check_drawing(stated)


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("train", ("experiment=digits", "+trainer.max_epochs=3"), "training counts steps"),
        ("train", ("experiment=digits", "+trainer.limit_train_batches=0.5"), "1 or more"),
        ("train", ("experiment=digits", "+trainer.overfit_batches=0.1"), "whole number"),
        ("sample", ("ckpt=digits", "+trainer.limit_predict_batches=1"), "num_images says how"),
        ("sample", ("ckpt=digits", "+trainer.overfit_batches=1"), "is for training"),
    ],
)
def test_refusals_come_in_one_sentence(
    in_process: Command, command: str, arguments: tuple[str, ...], told: str
) -> None:
    outcome = in_process(command, *arguments)
    assert outcome.code == 1 and told in outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert not Path("outputs").exists()


def test_what_a_user_adds_joins_what_a_run_needs(
    in_process: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = f"{{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: {tmp_path}/second}}"
    outcome = in_process(
        "train",
        *SMALL,
        "out=run",
        f"+trainer.callbacks=[{{_target_: {__name__}.Tells, name: it}}]",
        "+trainer.profiler=simple",
        "+trainer.enable_model_summary=true",
        f"+trainer.logger=[{logger}]",
    )
    assert outcome.code == 0, outcome.err
    assert "it saw 2" in outcome.out
    assert "run_training_batch" in caplog.text, "the profiler's report"
    assert "Trainable params" in outcome.out, "the summary of the layers"
    own, second = tmp_path / "run" / "logs", tmp_path / "second"
    for file in (own / "metrics.csv", next(second.rglob("metrics.csv"))):
        rows = [*csv.DictReader(StringIO(file.read_text()))]
        assert sum(bool(row["train/loss"]) for row in rows) == 2
    assert [*(tmp_path / "run" / "checkpoints").glob("step-00000002.ckpt")]


def test_a_dev_run_leaves_nothing(in_process: Command, tmp_path: Path) -> None:
    outcome = in_process("train", *SMALL, "out=run", "+trainer.fast_dev_run=true")
    assert outcome.code == 0, outcome.err
    assert "fast_dev_run: 1 step ran and validated; nothing is kept" in outcome.out
    assert not (tmp_path / "run").exists()


def test_previews_of_a_dev_run_leave_nothing(in_process: Command, tmp_path: Path) -> None:
    often = ("every_n_steps.preview=1", "preview.steps=1", "preview.classes=[3]")
    outcome = in_process("train", *SMALL, "out=run", "trainer.fast_dev_run=2", *often)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_callback_stands_beside_the_run_s_own(
    in_process: Command, tmp_path: Path
) -> None:
    mine = (
        "trainer.callbacks={_target_: lightning.pytorch.callbacks.ModelCheckpoint, "
        "monitor: val/loss, mode: min, save_top_k: -1, dirpath: mine}"
    )
    run = (*SMALL, "out=run", "every_n_steps.validation=1", mine)
    for steps in (2, 3):
        outcome = in_process("train", *run, f"max_steps={steps}")
        assert outcome.code == 0, outcome.err
    assert len([*(tmp_path / "mine").iterdir()]) == 3
    assert len([*(tmp_path / "run" / "checkpoints").glob("best-*.ckpt")]) == 1


def test_what_watches_alone_may_come_and_go_while_a_run_goes_on(
    in_process: Command, tmp_path: Path
) -> None:
    first = in_process("train", *SMALL, "out=run", "max_steps=1", "+trainer.max_time=00:01:00:00")
    assert first.code == 0, first.err
    # Runs from before have it among their settings.
    file = tmp_path / "run" / "config.yaml"
    record = yaml.safe_load(file.read_text())
    assert "max_time" not in record["settings"]["trainer"]
    record["settings"]["trainer"]["max_time"] = "00:01:00:00"
    file.write_text(yaml.safe_dump(record))
    for more in ("trainer.profiler=simple", "trainer.detect_anomaly=true"):
        again = in_process("train", *SMALL, "out=run", "max_steps=2", more)
        assert again.code == 0, again.err


OF_NO_EFFECT = {
    "keep.best=2 trainer.limit_val_batches=0": "keep.best=2: trainer.limit_val_batches is 0",
    "trainer.limit_val_batches=0 trainer.callbacks={_target_: "
    "lightning.pytorch.callbacks.EarlyStopping,monitor: val/loss}": "EarlyStopping monitors val",
    "trainer.callbacks=[{_target_: tests.cli.test_trainer_flags.Keeps},{_target_: "
    "tests.cli.test_trainer_flags.Keeps}]": "trainer.callbacks[1]: a second Keeps keeps its state",
    "trainer.plugins={_target_: lightning.pytorch.plugins.io.AsyncCheckpointIO}": "leave it out",
    "trainer.plugins={_target_: lightning.pytorch.plugins.precision.HalfPrecision}": (
        "expected trainer.precision=null with it"
    ),
    "trainer.callbacks={_target_: lightning.pytorch.callbacks.EarlyStopping,monitor: lost} "
    "every_n_steps.validation=1": "EarlyStopping monitors lost",
    "track.num_images=4": "track is null: choose track=fid as well",
    "optimizer.lrr=1": "takes no lrr\nDid you mean lr?",
    "trainer.benchmrak=true": "takes no benchmrak\nDid you mean benchmark?",
    "-m out=a,b seed=0,1": "out=a,b: expected one folder",
}


@pytest.mark.parametrize("arguments", OF_NO_EFFECT)
def test_what_would_act_on_nothing_is_refused(arguments: str, in_process: Command) -> None:
    split = re.split(r" (?=[\w.]+=)", arguments.removeprefix("-m "))
    multirun = ["-m"] * arguments.startswith("-m ")
    outcome = in_process("train", *multirun, *SMALL, *split)
    assert outcome.code == 1 and outcome.err.count("Traceback") == 0
    assert OF_NO_EFFECT[arguments] in outcome.err


def test_keys_of_the_optimiser_and_the_trainer_need_no_plus(
    in_process: Command, tmp_path: Path
) -> None:
    stated = ("optimizer.eps=1e-6", "trainer.inference_mode=false", "sampling.batch_size=4")
    outcome = in_process("train", *SMALL, "out=run", *stated)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"]
    assert config["optimizer"]["eps"] == 1e-6 and config["sampling"] == {"batch_size": 4}


def test_a_run_shorter_than_an_interval_logs_its_end(in_process: Command, tmp_path: Path) -> None:
    few = [each for each in SMALL if not each.startswith("every_n_steps.log")]
    outcome = in_process("train", *few, "out=run", "max_steps=2")
    assert outcome.code == 0 and "step 2 of 2: loss" in outcome.err
    text = (tmp_path / "run" / "logs" / "metrics.csv").read_text()
    rows = [*csv.DictReader(StringIO(text))]
    assert [row["step"] for row in rows if row["train/loss"]] == ["1"]


def trained(folder: Path, **options: Any) -> tuple[DiffusionModule, list[list[int]]]:
    """Train the small model for five steps; also return the labels of each batch."""
    module, labels = DiffusionModule(fresh_model(), optimizer=ADAM, seed=0), Labels()
    data = Digits(batch_size=4, seed=0)
    make_trainer(folder, 5, [labels], **options).fit(module, datamodule=data)
    return module, labels.seen


def test_training_goes_on_through_the_data_after_a_short_epoch(tmp_path: Path) -> None:
    whole, labels = trained(tmp_path / "whole")
    parts, same = trained(tmp_path / "parts", limit_train_batches=2)
    assert same == labels
    assert_same(state(parts), state(whole))


def test_overfitting_repeats_the_first_batches(tmp_path: Path) -> None:
    _, labels = trained(tmp_path / "whole")
    _, same = trained(tmp_path / "few", overfit_batches=2)
    assert same == [labels[i % 2] for i in range(5)]


@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
def test_batches_that_are_no_whole_steps_are_refused(option: str, in_process: Command) -> None:
    stated = (f"+trainer.{option}=3", "trainer.accumulate_grad_batches=2")
    outcome = in_process("train", *SMALL, *stated, "out=run")
    assert outcome.code == 1 and f"trainer.{option}=3: " in outcome.err
    assert "expected a multiple of it, such as 4" in outcome.err


UNFIT = {
    "StochasticWeightAveraging, swa_lrs: 0.01": "expected ema.decay",
    "EMAWeightAveraging": "expected ema.decay",
    "GradientAccumulationScheduler, scheduling: {0: 2}": "trainer.accumulate_grad_batches",
    "LearningRateFinder": "by -m optimizer.lr=",
    "BatchSizeFinder": "expected data.batch_size",
    "BackboneFinetuning": "expected freeze",
    "ModelPruning, pruning_fn: l1_unstructured": "the exported model",
    "ModelCheckpoint, every_n_epochs: 2": "expected every_n_train_steps",
    "ModelCheckpoint, save_on_train_epoch_end: true": "expected save_on_train_epoch_end=false",
    "EarlyStopping, monitor: val/loss, check_on_train_epoch_end: true": "_epoch_end=false",
    "LearningRateMonitor, logging_interval: epoch": "logging_interval=step",
    "Timer, duration: '00:00:00:09', interval: epoch": "interval=step",
    "ModelCheckpoint, save_top_k: 0": "expected 1 or more, -1 for all, or save_last: true",
}


@pytest.mark.parametrize("which", UNFIT)
def test_callbacks_that_cannot_work_in_a_run_are_refused(
    which: str, in_process: Command, tmp_path: Path
) -> None:
    target = f"trainer.callbacks={{_target_: lightning.pytorch.callbacks.{which}}}"
    outcome = in_process("train", *SMALL, target, "out=run")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    name = which.partition(",")[0]
    assert f"trainer.callbacks: {name} " in outcome.err and UNFIT[which] in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "which", ["LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor, of sizes"]
)
def test_callbacks_that_only_log_are_refused_without_a_logger(
    which: str, in_process: Command, tmp_path: Path
) -> None:
    name, _, rest = which.partition(",")
    takes = f", batch_size_fn: {{_target_: {__name__}.size_of, _partial_: true}}" if rest else ""
    mine = f"trainer.callbacks={{_target_: lightning.pytorch.callbacks.{name}{takes}}}"
    outcome = in_process("train", *SMALL, mine, "logger=none", "out=run")
    assert outcome.code == 1 and not (tmp_path / "run").exists()
    assert f"trainer.callbacks: {name} hands what it measures to a logger, and" in outcome.err
    assert "logger=csv" in outcome.err and "Traceback" not in outcome.err


def size_of(batch: Any) -> int:
    return len(batch[0])


def test_checkpoints_that_only_keep_the_last_are_written(in_process: Command) -> None:
    target = "_target_: lightning.pytorch.callbacks.ModelCheckpoint"
    mine = f"trainer.callbacks={{{target}, dirpath: mine, save_top_k: 0, save_last: true}}"
    outcome = in_process("train", *SMALL, mine, "every_n_steps.validation=1", "out=run")
    assert outcome.code == 0, outcome.err
    assert Path("mine", "last.ckpt").exists()


def test_a_share_of_batches_that_is_none_is_refused(in_process: Command, tmp_path: Path) -> None:
    outcome = in_process("train", *SMALL, "trainer.limit_val_batches=0.001", "out=run")
    assert outcome.code == 1 and not (tmp_path / "run").exists()
    assert "trainer.limit_val_batches=0.001: the held-out images are " in outcome.err
    assert "or a whole number of batches" in outcome.err and "Traceback" not in outcome.err


def test_the_least_share_that_is_told_is_a_batch() -> None:
    for length in range(1, 3000):
        with pytest.raises(ValueError) as refused:
            check_share(0.5 / length, [range(length)])
        found = re.search(r"expected ([\d.]+) or more", str(refused.value))
        assert found is not None
        check_share(float(found[1]), [range(length)])
    with pytest.raises(ValueError, match="nobody can count; expected a whole number"):
        check_share(0.5, iter(()))


def test_a_metric_that_nothing_logs_is_told_at_the_first_validation(in_process: Command) -> None:
    """Where a callback of the user's might have logged it."""
    stops = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val_loss}"
    mine = f"{{_target_: {__name__}.Tells, name: it}}"
    outcome = in_process(
        *("train", *SMALL, f"trainer.callbacks=[{stops},{mine}]"),
        *("every_n_steps.validation=1", "every_n_steps.checkpoint=1", "out=run"),
    )
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "EarlyStopping monitors val_loss, which nothing has logged by step 1" in outcome.err
    assert "Did you mean val/loss?" in outcome.err


@pytest.mark.parametrize(
    ("callback", "ends"),
    [
        # The first looks at step 2, after a validation; the second when an "epoch" ends.
        ("ModelCheckpoint, monitor: train_loss, every_n_train_steps: 2", 2),
        ("EarlyStopping, monitor: train_loss, check_on_train_epoch_end: true", 1),
    ],
)
def test_a_metric_that_nothing_logs_is_told_at_other_times(
    callback: str, ends: int, in_process: Command
) -> None:
    """Where Lightning would tell it in its own words."""
    mine = f"{{_target_: {__name__}.Tells, name: it}}"
    outcome = in_process(
        *("train", *SMALL, "every_n_steps.validation=1", "every_n_steps.checkpoint=1", "out=run"),
        f"trainer.callbacks=[{{_target_: lightning.pytorch.callbacks.{callback}}},{mine}]",
        "trainer.limit_train_batches=1",
    )
    name = callback.partition(",")[0]
    told = f"{name} monitors train_loss, which nothing has logged by step {ends}; expected one of"
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert told in outcome.err and "Did you mean train/loss" in outcome.err
    assert "could not find the monitored key" not in outcome.err.partition("error:")[2]


OWN = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler


class Ends(Callback):
    def on_train_end(self, trainer, pl_module):
        print("my callback:", trainer.global_step)


class Prints(Logger):
    name = version = None

    def log_hyperparams(self, *_, **__): ...

    def log_metrics(self, metrics, step=None):
        print("my logger:", sorted(metrics))


class Counts(PassThroughProfiler):
    def describe(self):
        print("my profiler")


class Mine(Precision):
    def teardown(self):
        print("my plugin")
"""
TOLD = ("my callback: 2", "my logger:", "my profiler", "my plugin")


def test_plugs_of_a_file_of_ones_own_act(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, alone or in lists, and from Python."""
    (tmp_path / "my_plugs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = in_process(
        "train",
        *SMALL,
        "out=run",
        "trainer.callbacks={_target_: my_plugs.Ends}",
        "+trainer.logger={_target_: my_plugs.Prints}",
        "trainer.profiler={_target_: my_plugs.Counts}",
        "+trainer.plugins=[{_target_: my_plugs.Mine}]",
        "trainer.precision=null",
    )
    assert outcome.code == 0, outcome.err
    assert all(told in outcome.out for told in TOLD), outcome.out
    assert (tmp_path / "run" / "logs" / "metrics.csv").is_file(), "ours are there as well"


def test_plugs_act_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_plugs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    import my_plugs  # type: ignore[import-not-found]

    trainer = make_trainer(
        tmp_path,
        2,
        [my_plugs.Ends()],
        logger=my_plugs.Prints(),
        log_every_n_steps=1,
        profiler=my_plugs.Counts(),
        plugins=[my_plugs.Mine()],
    )
    trainer.fit(DiffusionModule(fresh_model(), optimizer=ADAM), datamodule=Digits(8))
    out = capsys.readouterr().out
    assert all(told in out for told in TOLD), out


@pytest.mark.parametrize("name", ["callbacks", "plugins", "profiler", "max_time", "fast_dev_run"])
def test_what_belongs_to_the_trainer_is_looked_for_there(in_process: Command, name: str) -> None:
    outcome = in_process("train", *SMALL, f"+{name}=3")
    assert outcome.code == 1 and f"did you mean trainer.{name}?" in outcome.err


def test_a_bar_of_ones_own_takes_the_place_of_ours(in_process: Command, tmp_path: Path) -> None:
    bar = "lightning.pytorch.callbacks.RichProgressBar"
    outcome = in_process("train", *SMALL, "out=run", f"trainer.callbacks=[{{_target_: {bar}}}]")
    assert outcome.code == 0, outcome.err
    assert "step 2 of 2" not in outcome.err


# Lightning does not know that the data go on at the trainer's step.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
@pytest.mark.parametrize("stop", [3, 4], ids=["within an epoch", "at its end"])
def test_a_run_of_few_batches_goes_on_where_it_was_stopped(
    tmp_path: Path, option: str, stop: int
) -> None:
    def train(folder: Path, steps: int) -> tuple[DiffusionModule, list[list[int]]]:
        module, labels = DiffusionModule(fresh_model(), optimizer=ADAM, seed=0), Labels()
        checkpoint, _ = newest_checkpoint(folder, module)
        callbacks = [labels, LastCheckpoints(folder, 1)]
        trainer = make_trainer(folder, steps, callbacks, **{option: 2})
        data = Digits(batch_size=4, seed=0)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module, labels.seen

    whole, seen = train(tmp_path / "whole", 7)
    _, before = train(tmp_path / "parts", stop)
    parts, after = train(tmp_path / "parts", 7)
    assert before + after == seen
    assert_same(state(parts), state(whole))
