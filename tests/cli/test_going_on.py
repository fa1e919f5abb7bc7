"""``resume_from``: a new run that goes on from another one under other settings, and its record."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.checkpoints import load
from sag_dit.checkpoints.averages import exponent, snapshots_in
from sag_dit.cli import train as train_command
from sag_dit.cli.app import launch

Command = Callable[..., Any]

SMALL = (
    "experiment=digits",
    "model.hidden_size=48",
    "model.depth=2",
    "model.num_heads=3",
    "data.batch_size=16",
    "every_n_steps.checkpoint=2",
    "every_n_steps.snapshot=2",
    "every_n_steps.log=1",
    "ema.further={decays:[0.9],sigma_rel:[0.05,0.1]}",
    "logger=none",
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps; no test changes it."""
    folder = tmp_path_factory.mktemp("runs") / "parent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")
        launch("train", train_command.run_train, (*SMALL, "max_steps=4", f"out={folder}"))
    return folder


@pytest.fixture
def train(in_process: Command) -> Command:
    """``train.py`` with the same small model."""

    def run(*arguments: str) -> Any:
        return in_process("train", *SMALL, *arguments)

    return run


@pytest.fixture
def child(train: Command, parent: Path) -> Command:
    """The same, going on from the run of four steps."""

    def run(*arguments: str) -> Any:
        return train(f"resume_from={parent}", *arguments)

    return run


def record(folder: str) -> dict[str, Any]:
    return dict(yaml.safe_load(Path(folder, "config.yaml").read_text()))


def last(folder: str, step: int) -> dict[str, Any]:
    file = Path(folder, "checkpoints", f"step-{step:08d}.ckpt")
    return dict(torch.load(file, weights_only=True))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_with_the_same_settings_it_is_as_if_the_run_had_never_ended(
    train: Command, child: Command
) -> None:
    """Weights, averages, moments, batches and noise: to the same bits, snapshots included."""
    assert train("max_steps=8", "out=whole").code == 0
    outcome = child("max_steps=8", "out=child")
    assert outcome.code == 0, outcome.err
    assert "goes on from step 4 of" in outcome.out and "what differs:\n  nothing" in outcome.out
    assert "averages taken over: ema, 0.9, 0.05, 0.1" in outcome.out
    assert "optimiser: the state of 31 parameters taken over" in outcome.out
    assert_same(load_file("child/model.safetensors"), load_file("whole/model.safetensors"))
    here, there = last("child", 8), last("whole", 8)
    assert_same(here["state_dict"], there["state_dict"])
    moments = [each["optimizer_states"][0]["state"] for each in (here, there)]
    for index, state in moments[1].items():
        assert_same(moments[0][index], state)
    files = [sorted(p.name for p in Path(out, "averages").iterdir()) for out in ("child", "whole")]
    assert files[0] == files[1] and len(files[0]) == 8
    for ema in (0.9, 0.05, 0.15):
        states = [dict(load(o, ema=ema).denoiser.state_dict()) for o in ("child", "whole")]
        assert_same(*states)


def test_a_power_functions_time_is_that_of_images(child: Command, parent: Path) -> None:
    """With twice the images a step counts twice: EDM2's update, by batch and images so far."""
    twice = ("data.batch_size=16", "trainer.accumulate_grad_batches=2", "optimizer.lr=0.01")
    outcome = child(*twice, "every_n_steps.checkpoint=1", "max_steps=5", "out=child")
    assert outcome.code == 0, outcome.err
    assert "each step of that run counts as 0.5 steps of this one" in outcome.out
    before, after = (last("child", step)["state_dict"] for step in (4, 5))
    for name, gamma in (("0_05", float(exponent(0.05))), ("0_1", float(exponent(0.1)))):
        kept = (1 - 32 / (4 * 16 + 32)) ** (gamma + 1)
        for key in [key for key in after if key.startswith(f"further.{name}.module.")]:
            raw = after[key.replace(f"further.{name}.module.", "denoiser.")]
            expected = kept * before[key].double() + (1 - kept) * raw.double()
            torch.testing.assert_close(after[key].double(), expected, rtol=1e-5, atol=1e-7)
        assert int(after[f"further.{name}.n_averaged"]) == 3
    # A decay counts steps, and snapshots say what they mean in the new run; the parent's stay.
    assert int(after["further.0_9.n_averaged"]) == int(after["averaged.n_averaged"]) == 5
    said = {folder: snapshots_in(Path(folder, "averages")) for folder in ("child", str(parent))}
    found = {folder: {each.taken.updates for each in held} for folder, held in said.items()}
    assert found == {"child": {1, 2}, str(parent): {2, 4}}
    states = [
        load(Path(each, "checkpoints", "step-00000004.ckpt"), ema=0.1).denoiser.state_dict()
        for each in ("child", parent)
    ]
    assert_same(*map(dict, states))
    assert load("child", ema=0.07).denoiser is not None


def test_what_differs_is_told_and_recorded_and_the_parent_is_needed_no_more(
    train: Command, in_process: Command, parent: Path
) -> None:
    shutil.copytree(parent, "copy")
    other = (
        *("resume_from=copy", "optimizer.lr=1e-4", "data.batch_size=24", "max_steps=7"),
        *("trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"),
        *("ema.further={decays:[0.99],sigma_rel:[0.1]}", "every_n_steps.checkpoint=1"),
    )
    outcome = train(*other, "out=whole")
    assert outcome.code == 0, outcome.err
    for told in (
        "optimizer.lr: there 0.0015, now 0.0001",
        "data.batch_size: there 16, now 24",
        "trainer.accumulate_grad_batches: there 1, now 2",
        "trainer.precision: there 32-true, now bf16-mixed",
        "averages taken over: ema, 0.1\n",
        "averages that start here, from the weights taken over: 0.99",
        "in that run alone, so they are left out: further.0_9, further.0_05",
    ):
        assert told in outcome.out
    assert "not in the run" not in outcome.out
    parent_of = record("whole")["parent"]
    assert (parent_of["folder"], parent_of["step"]) == ("copy", 4)
    assert len(parent_of["identity"]) == 64 and "parent" not in parent_of
    assert last("whole", 7)["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
    assert int(last("whole", 7)["state_dict"]["further.0_99.n_averaged"]) == 3
    assert int(last("whole", 7)["state_dict"]["averaged.n_averaged"]) == 7

    # Stopped after a step, it goes on from its own checkpoint, also without the other run.
    stopped = train(*other, "max_steps=5", "out=stopped")
    assert stopped.code == 0, stopped.err
    shutil.rmtree("copy")
    again = train(*other, "out=stopped")
    assert again.code == 0, again.err
    assert "changed from step 5 on: max_steps=7 (was 5)" in again.out
    assert record("stopped")["changed"] == [{"step": 5, "keys": {"max_steps": [5, 7]}}]
    assert record("stopped")["parent"] == parent_of
    assert_same(load_file("stopped/model.safetensors"), load_file("whole/model.safetensors"))

    # A run that goes on from this one tells of both; so does the card of an export.
    third = train("resume_from=stopped", "max_steps=8", "out=third")
    assert third.code == 0, third.err
    assert record("third")["parent"]["parent"] == parent_of
    exported = in_process("export", "ckpt=third", "out=exported")
    assert exported.code == 0, exported.err
    card = Path("exported", "README.md").read_text()
    assert "went on from step 7 of `stopped`" in card and "from step 4 of `copy`" in card


def test_one_checkpoint_of_a_run_can_be_gone_on_from(train: Command, parent: Path) -> None:
    earlier = parent / "checkpoints" / "step-00000002.ckpt"
    outcome = train(f"resume_from={earlier}", "max_steps=4", "out=child")
    assert outcome.code == 0, outcome.err
    assert record("child")["parent"]["step"] == 2
    assert_same(load_file("child/model.safetensors"), load_file(parent / "model.safetensors"))


def test_a_start_that_ends_before_the_first_checkpoint_begins_as_the_first(
    child: Command, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of writing it, with half of the snapshots there."""
    save = torch.save

    def full(value: Any, stream: Any) -> None:
        stream.write(b"PK\x03\x04half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    outcome = child("max_steps=6", "out=child")
    assert outcome.code == 1 and "could not be written" in outcome.err
    assert not list(Path("child", "checkpoints").glob("step-*.ckpt"))
    monkeypatch.setattr(torch, "save", save)
    next(Path("child", "averages").glob("*.safetensors")).unlink()
    assert child("max_steps=6", "out=child").code == 0
    assert child("max_steps=6", "out=whole").code == 0
    assert_same(load_file("child/model.safetensors"), load_file("whole/model.safetensors"))
    states = [dict(load(out, ema=0.15).denoiser.state_dict()) for out in ("child", "whole")]
    assert_same(*states)
    # The parent's own are as they were, though they lie at the same place.
    assert len(list((parent / "averages").iterdir())) == 4


@pytest.mark.parametrize(("counts", "rate"), [("continued", 6 / 8), ("anew", 2 / 8)])
def test_a_schedule_counts_the_steps_of_the_other_run_or_begins_anew(
    child: Command, counts: str, rate: float
) -> None:
    warmup = ("schedule=warmup", "schedule.total_iters=8", "schedule.start_factor=1e-9")
    outcome = child(*warmup, f"resume_schedule={counts}", "max_steps=6", "out=child")
    assert outcome.code == 0, outcome.err
    (group,) = last("child", 6)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(rate * 1.5e-3, rel=1e-6)


def test_the_optimiser_can_begin_anew(child: Command) -> None:
    other = ("optimizer._target_=torch.optim.SGD", "resume_optimizer=false", "max_steps=5")
    outcome = child(*other, "out=child")
    assert outcome.code == 0, outcome.err
    assert "optimiser: starts with a fresh state" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("max_steps=4",), "max_steps=4: expected more than 4, the step of resume_from="),
        (("model.hidden_size=24",), "is of another network: "),
        (("optimizer._target_=torch.optim.SGD",), "is of another optimiser than SGD"),
        (("out={parent}",), "that is the run in out="),
        (("resume_from=nowhere",), "resume_from=nowhere: nowhere holds no checkpoints"),
        (("resume_from=note.txt",), "note.txt"),
        (
            ("resume_from=null", "resume_optimizer=false"),
            "resume_optimizer=false acts on nothing, since resume_from",
        ),
        (("finetune.weights=raw",), "finetune.weights=raw acts on nothing, since ckpt is null"),
        (("ema.further.decays=[0.05]",), "ema.further.decays=[0.05]: expected"),
        (("ema.further.decays=[0.9,0.9]",), "ema.further: 0.9 comes twice"),
        (("resume_schedule=later",), "resume_schedule=later: expected one of continued, anew"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, child: Command, parent: Path) -> None:
    Path("note.txt").write_text("none")
    stated = [each.format(parent=parent) for each in arguments]
    before = (parent / "config.yaml").read_bytes()
    outcome = child("max_steps=6", "out=child", *stated)
    assert outcome.code == 1, outcome.out
    assert message in outcome.err and "Traceback" not in outcome.err
    assert not Path("child").exists() and "goes on" not in outcome.out
    assert (parent / "config.yaml").read_bytes() == before


def test_a_run_of_other_settings_is_refused_and_the_way_out_is_told(
    train: Command, parent: Path
) -> None:
    shutil.copytree(parent, "run")
    refused = train("optimizer.lr=1e-4", "max_steps=6", "out=run")
    assert refused.code == 1
    assert "optimizer.lr: there 0.0015, now 0.0001" in refused.err
    assert "or begin another run from it: resume_from=run" in refused.err


TUNE = ("experiment=finetune", "data=digits", "data.batch_size=16", "logger=none", "max_steps=1")


def test_fine_tuning_begins_with_the_weights_that_are_asked_for(
    in_process: Command, parent: Path
) -> None:
    still = (*TUNE, f"ckpt={parent}", "optimizer.lr=0")
    for which, ema in (("raw", False), ("average", True), ("0.9", 0.9), ("0.15", 0.15)):
        outcome = in_process("train", *still, f"finetune.weights={which}", f"out=run-{which}")
        assert outcome.code == 0, outcome.err
        found = load_file(f"run-{which}/model.safetensors")
        expected = dict(load(parent, ema=ema).class_conditional.network.state_dict())
        assert_same(found, expected)
    refused = in_process("train", *still, "finetune.weights=0.8")
    assert refused.code == 1 and "ema=0.8: " in refused.err and "0.9" in refused.err


def test_fine_tuning_can_keep_the_optimisers_state(in_process: Command, parent: Path) -> None:
    """With a new class the label table begins anew, and all else keeps its moments."""
    tune = (*TUNE, f"ckpt={parent}", "finetune.weights=raw", "finetune.optimizer=true")
    outcome = in_process("train", *tune, "data.classes=[3,4]", "optimizer.lr=0", "out=tuned")
    assert outcome.code == 0, outcome.err
    assert "the state of 30 parameters taken over, fresh for 1 other" in outcome.out
    after, before = (last(*each)["optimizer_states"][0] for each in (("tuned", 1), (parent, 4)))
    steps = {float(each["step"]) for each in after["state"].values()}
    assert steps == {1.0, 5.0} and {float(s["step"]) for s in before["state"].values()} == {4.0}
    assert len(last("tuned", 1)["optimizer_parameters"]) == 31
    assert in_process("train", *tune, "data.classes=[3,4]", "optimizer.lr=0", "out=tuned").code == 0
    # Moments of rows that are other classes' now would be another class's.
    turned = in_process("train", *tune, "data.classes=[9,8,7,6,5,4,3,2,1,0]", "out=turned")
    assert "the state of 30 parameters taken over, fresh for 1 other" in turned.out, turned.err
    refused = in_process("train", *TUNE, "ckpt=digits", "finetune.optimizer=true")
    assert refused.code == 1 and "finetune.optimizer=true: " in refused.err


def test_what_another_kind_of_step_keeps_is_not_taken_over(
    train: Command, in_process: Command
) -> None:
    """Of a matrix Muon keeps a momentum, AdamW two moments; and amsgrad a third."""
    muon = ("optimizer=muon", "logger=none")
    assert train(*muon, "max_steps=2", "out=muon").code == 0
    rule = "param_groups=[{match: 'blocks.0.*', use_muon: false}]"
    on = ("resume_from=muon", "max_steps=3", "every_n_steps.checkpoint=1")
    done = train(*muon, *on, rule, "out=mixed")
    assert done.code == 0, done.err
    matrices = 5 if "blocks.0.adaLN_modulation" in str(last("muon", 2)["state_dict"].keys()) else 4
    assert (
        f"the state of {31 - matrices} parameters taken over, fresh for {matrices} others"
        in done.out
    )
    held = last("mixed", 3)
    states = held["optimizer_states"][0]["state"]
    names = held["optimizer_parameters"]
    kept = {name: set(states[index]) for index, name in enumerate(names)}
    assert kept["denoiser.network.blocks.0.attn.qkv.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["denoiser.network.blocks.1.attn.qkv.weight"] == {"momentum_buffer"}
    assert train("max_steps=2", "out=adamw").code == 0
    again = ("resume_from=adamw", "max_steps=3", "+optimizer.amsgrad=true", "out=amsgrad")
    refused = train(*again)
    assert refused.code == 1 and "lacks max_exp_avg_sq, which AdamW keeps" in refused.err
    # What was refused has trained nothing: the remedy goes into the same folder.
    assert not Path("amsgrad", "config.yaml").exists() and not Path("amsgrad", "averages").exists()
    assert train(*again, "resume_optimizer=false").code == 0
    # Fine-tuning keeps what fits, and names the remedy where the optimiser is another one.
    tune = ("train", *TUNE, "ckpt=muon", "finetune.weights=raw", "finetune.optimizer=true")
    tuned = in_process(*tune, "optimizer=muon", "out=tuned")
    assert "optimiser: the state of 31 parameters taken over" in tuned.out, tuned.err
    other = in_process(*tune, "out=other")
    assert other.code == 1 and "is of another optimiser than AdamW" in other.err
    assert "finetune.optimizer=false" in other.err
