"""Optimisers and rules for parameters, from the command line, the docs and a file of the user's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sag_dit.cli.composing import compose
from sag_dit.data.digits import Digits
from sag_dit.training.module import DiffusionModule
from tests.cli.test_train_stops import (
    STEPS,
    assert_bit_equal,
    checkpoints,
    finish,
    kill,
    start,
    wait_for_checkpoint,
)
from tests.pages import Page
from tests.training.making import fresh_model, make_trainer

SECTION = Page.of("training.md").section("Optimisers")
COMMANDS = re.findall(r"^    (python train.py .*)", SECTION.text, re.MULTILINE)
TINY = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3", "data.batch_size=16")
QUICK = (*TINY, "max_steps=2", "every_n_steps.log=1", "trainer.accelerator=cpu", "logger=none")

Command = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the section, where Python finds them."""
    SECTION.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def groups_in(out: Path) -> list[dict[str, Any]]:
    """The groups of the optimiser in a run's last checkpoint."""
    found: list[dict[str, Any]] = torch.load(checkpoints(out)[-1], weights_only=True)[
        "optimizer_states"
    ][0]["param_groups"]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_docs_run(command: str, in_process: Command, tmp_path: Path) -> None:
    if "schedule_free" in command:
        pytest.importorskip("schedulefree")
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    outcome = in_process("train", *arguments, *QUICK, "out=run")
    assert outcome.code == 0, outcome.err
    several = "param_groups" in command or "muon" in command
    assert ("parameter groups:" in outcome.out) == several
    assert (len(groups_in(tmp_path / "run")) > 1) == several


def test_an_optimizer_and_a_rule_from_a_file(in_process: Command, files: Path) -> None:
    (command,) = SECTION.commands
    python, dash, module, name, *arguments = shlex.split(command)
    assert (python, dash, module, name) == ("python", "-m", "sag_dit", "train")
    outcome = in_process(name, *arguments, *TINY, "trainer.accelerator=cpu", "logger=none")
    assert outcome.code == 0, outcome.err
    groups = groups_in(files / "signs")
    assert sorted(group["lr"] for group in groups) == pytest.approx([1e-4, 1e-3])
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]
    # The same from Python.
    from my_optimizer import SignSGD, slow_output  # type: ignore[import-not-found]

    model = fresh_model()
    before = {name: p.detach().clone() for name, p in model.denoiser.network.named_parameters()}
    made = partial(SignSGD, lr=1e-3, weight_decay=0.1)
    optimized = DiffusionModule(model, optimizer=made, param_groups=["no_decay", slow_output])
    make_trainer(files, 1).fit(optimized, datamodule=Digits(8))
    after = dict(model.denoiser.network.named_parameters())
    for name, rate in (("final_layer.linear.bias", 1e-4), ("x_embedder.proj.bias", 0)):
        # At the start the output is zero, and so are all gradients but its own.
        moved = (after[name] - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate))


ODD = """
import torch


class NoClosure(torch.optim.SGD):
    def step(self):
        super().step()


class Ignores(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
"""
PLATEAU = "schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"
REFUSED = {
    "optimizer=mion": "Did you mean muon or lion",
    "optimizer=sgd +optimizer.betas=[0.9,0.9]": "torch.optim.SGD takes no betas",
    "optimizer._target_=torch.optim.SDG": "optimizer._target_=torch.optim.SDG: ",
    "optimizer._target_=torch.nn.Linear": "optimizer: ",
    "optimizer._target_=torch.optim.SparseAdam": "SparseAdam takes sparse gradients",
    "optimizer=timm": "optimizer.opt is not set",
    "optimizer=timm optimizer.opt=lamm": "optimizer.opt=lamm: timm has no such optimiser",
    "optimizer=timm optimizer.opt=lamb +optimizer.foo=1": "unexpected keyword argument 'foo'",
    "optimizer.betas=[0.9,0.9,0.9]": "optimizer.betas=[0.9,0.9,0.9]: expected a list of 2 numbers",
    "optimizer=muon optimizer.adjust_lr_fn=x": "optimizer: Adjust learning rate function x",
    "optimizer._target_=my_odd_steps.NoClosure": "my_odd_steps.NoClosure.step takes no closure",
    "optimizer._target_=my_odd_steps.Ignores": "my_odd_steps.Ignores.step does not call its",
    f"{PLATEAU} schedule._partial_=true": "schedule: ReduceLROnPlateau follows what validation",
    "param_groups=no_decay": "param_groups=no_decay: expected a list",
    "param_groups=[nodecay]": "param_groups[0]: nodecay: expected no_decay",
    "param_groups=[{_target_: nowhere.rule}]": "param_groups[0]._target_=nowhere.rule: there is",
    "param_groups=[{match: blocks, lr: fast}]": "lr=fast: expected a number",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_is_refused_before_data_is_read(
    arguments: str, in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_odd_steps.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "empty").mkdir()
    data = ("experiment=folder", f"data.root={tmp_path / 'empty'}", "out=run")
    key = "param_groups="
    stated = [arguments] if arguments.startswith(key) else arguments.split()
    late = arguments.endswith("lr: fast}]")
    where = ("experiment=digits", *TINY, "out=run") if late else data
    outcome = in_process("train", *where, *stated)
    assert outcome.code == 1
    assert REFUSED[arguments] in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_a_step_that_the_device_cannot_take_is_refused(
    option: str, in_process: Command, tmp_path: Path
) -> None:
    adam = ("optimizer._target_=torch.optim.AdamW", f"+optimizer.{option}=true", "out=run")
    outcome = in_process("train", "experiment=digits", *QUICK, *adam)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "optimizer: AdamW cannot take a step on cpu with its settings (" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("choice", "package"), [("schedule_free", "schedulefree"), ("adamw8bit", "bitsandbytes")]
)
def test_a_missing_package_is_told_before_data_is_read(
    choice: str,
    package: str,
    in_process: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sag_dit.training.optimizers.find_spec", lambda name: None)
    data = ("experiment=folder", f"data.root={tmp_path / 'nothing'}", "ema.decay=null")
    outcome = in_process("train", *data, f"optimizer={choice}")
    assert outcome.code == 1
    assert f"which is not installed; pip install {package}\n" in outcome.err
    assert "nothing" not in outcome.err


def test_schedule_free_stands_alone(in_process: Command, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    free = ("experiment=digits", *QUICK, "optimizer=schedule_free", "out=run")
    outcome = in_process("train", *free)
    assert "ema.decay=0.995: beside AdamWScheduleFree" in outcome.err
    outcome = in_process("train", *free, "ema.decay=null", "schedule=cosine")
    assert "schedule: beside AdamWScheduleFree" in outcome.err
    assert "set optimizer.warmup_steps" in outcome.err
    outcome = in_process("train", *free, "ema.decay=null", "ema.further.sigma_rel=[0.1]")
    assert "ema.further=[0.1]: beside AdamWScheduleFree" in outcome.err
    outcome = in_process("train", *free, "ema.decay=null", "optimizer.lr=0.1")
    assert outcome.code == 0, outcome.err
    exported = load_file(tmp_path / "run" / "model.safetensors")
    saved = torch.load(checkpoints(tmp_path / "run")[-1], weights_only=True)["state_dict"]
    name = "x_embedder.proj.weight"
    assert torch.equal(exported[name], saved[f"averaged.module.network.{name}"])
    assert not torch.equal(exported[name], saved[f"denoiser.network.{name}"])


def test_an_experiment_keeps_its_rate_whatever_the_optimizer() -> None:
    muon = compose("train", ["experiment=digits", "optimizer=muon"]).optimizer
    assert (muon["lr"], muon["_target_"]) == (1.5e-3, "sag_dit.training.optimizers.Muon")
    assert "fused" not in muon
    other = compose("train", ["experiment=digits", "optimizer._target_=torch.optim.NAdam"])
    assert other.optimizer.keys() == {"_target_", "_partial_", "lr", "betas", "weight_decay"}


RULED = (
    "optimizer=muon",
    "optimizer.weight_decay=0.1",
    "param_groups=[no_decay,{layer_decay: 0.8}]",
    *("schedule._target_=torch.optim.lr_scheduler.ExponentialLR", "schedule.gamma=0.95"),
    "schedule._partial_=true",
)


def last_state(out: Path) -> dict[str, torch.Tensor]:
    """The exported weights, and the weights and the optimiser's state of the last checkpoint."""
    last = torch.load(checkpoints(out)[-1], weights_only=True)
    assert last["global_step"] == STEPS
    kept = last["optimizer_states"][0]["state"]
    inner = {
        f"{i}.{name}": value
        for i, each in kept.items()
        for name, value in each.items()
        if isinstance(value, torch.Tensor)
    }
    assert {name.partition(".")[2] for name in inner} == {
        *("momentum_buffer", "step", "exp_avg", "exp_avg_sq"),
    }
    return {**load_file(out / "model.safetensors"), **last["state_dict"], **inner}


@pytest.mark.slow
def test_a_run_of_muon_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL of another process: it has to be started and trained, and started again."""
    out = tmp_path / "run"
    process = start(out, *RULED)
    wait_for_checkpoint(process, out, beyond=0)
    kill(process)
    assert checkpoints(out) and not (out / "model.safetensors").exists()
    finish(out, *RULED)
    finish(tmp_path / "whole", *RULED)
    assert_bit_equal(last_state(out), last_state(tmp_path / "whole"))


@pytest.mark.slow
def test_two_ranks_train_with_muon_copied_and_sharded(tmp_path: Path) -> None:
    """Processes of their own, each with torch to import: copies, and parts that are stopped once.

    Newton-Schulz runs in bfloat16, so that another order of its sums shows in the third digit of a
    step; a rank that went its own way, or saw its own part alone, would be off by whole steps.
    """
    ranked = (*RULED, "+optimizer.eps=1e-3", "trainer.accelerator=cpu", "trainer.devices=2")
    finish(tmp_path / "copied", *ranked, "trainer=ddp", "max_steps=8")
    for name, steps in (("parts", 4), ("parts", 8), ("whole", 8)):
        finish(tmp_path / name, *ranked, "trainer=fsdp", f"max_steps={steps}")
    copied, parts, whole = (
        load_file(tmp_path / name / "model.safetensors") for name in ("copied", "parts", "whole")
    )
    assert_bit_equal(parts, whole)
    first = torch.load(checkpoints(tmp_path / "copied")[0], weights_only=True)
    assert first["global_step"] == 4
    before = {name: first["state_dict"][f"averaged.module.network.{name}"] for name in copied}

    def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(left[name] - right[name]).flatten() for name in left]).norm())

    assert distance(copied, before) > 0
    assert distance(copied, whole) < 0.05 * distance(copied, before)


@pytest.mark.slow
def test_an_optimizer_that_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    """Two ranks of FSDP, which only processes of their own can be."""
    ranked = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer=fsdp")
    process = start(tmp_path / "run", *ranked, "optimizer=adafactor", "optimizer.lr=1e-2")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "optimizer: it cannot train weights that are split over ranks" in printed
    assert "Traceback" not in printed
