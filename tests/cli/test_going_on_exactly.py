"""``resume_from`` without a change ends as a run that was never ended, whatever its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import rows

Command = Callable[..., Any]

SMALL = (
    "experiment=digits",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "data.batch_size=32",  # So that each level of noise has images at every step.
    "trainer.accelerator=cpu",
    "every_n_steps.log=1",
    "every_n_steps.checkpoint=1",
    "every_n_steps.validation=3",
    "keep.last=10",
    "keep.best=0",
)

OWN = """
import torch
from lightning.pytorch import Callback


class Fading(torch.optim.Optimizer):
    '''Counts its steps in its groups, and keeps nothing of a parameter.'''

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["count"])
        return loss


class Counts(Callback):
    '''Logs how many steps it has seen.'''

    def __init__(self):
        self.seen = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen += 1
        pl_module.log("seen", float(self.seen))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Other(Counts):
    '''Another one.'''
"""


@pytest.fixture
def train(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    (tmp_path / "my_exact_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*arguments: str, code: int = 0) -> Any:
        outcome = in_process("train", *SMALL, *arguments)
        assert outcome.code == code, outcome.err
        return outcome

    return run


def groups_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    groups = state["optimizer_states"][0]["param_groups"]
    return [{name: v for name, v in group.items() if name != "params"} for group in groups]


FREE = ("optimizer=schedule_free", "ema.decay=null", "optimizer.warmup_steps=10")
COSINE = ("schedule=cosine", "schedule.num_warmup_steps=2", "schedule.num_training_steps=12")
SETTINGS: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "a schedule": COSINE,
    "its own counts": ("optimizer._target_=my_exact_parts.Fading",),
    "schedule-free": (*FREE, "optimizer.lr=1e-2"),
    "lamb": ("optimizer=timm", "optimizer.opt=lamb"),
    "adan": ("optimizer=timm", "optimizer.opt=adan"),
    "lookahead": ("optimizer=timm", "optimizer.opt=lookahead_adamw"),
    "few batches": ("+trainer.overfit_batches=3", *COSINE),
    "ends of epochs": ("+trainer.limit_train_batches=2",),
    "accumulated": ("+trainer.limit_train_batches=4", "trainer.accumulate_grad_batches=2"),
    "a callback": ("+trainer.callbacks=[{_target_: my_exact_parts.Counts}]",),
}


@pytest.mark.parametrize("which", SETTINGS)
@pytest.mark.parametrize("step", [4, 6])
def test_it_ends_as_a_run_that_was_never_ended(which: str, step: int, train: Command) -> None:
    """After a step with no validation, and after one at which it validates and an epoch ends."""
    if which == "schedule-free":
        pytest.importorskip("schedulefree")
    settings = SETTINGS[which]
    train(*settings, "max_steps=9", "out=whole")
    checkpoint = Path("whole", "checkpoints", f"step-{step:08d}.ckpt")
    train(*settings, f"resume_from={checkpoint}", "max_steps=9", "out=child")
    here, there = (load_file(f"{out}/model.safetensors") for out in ("child", "whole"))
    assert [name for name in there if not torch.equal(here[name], there[name])] == []
    files = [Path(out, "checkpoints", "step-00000009.ckpt") for out in ("child", "whole")]
    states = [torch.load(file, weights_only=True) for file in files]
    assert groups_of(states[0]) == groups_of(states[1])
    assert rows("child") == [row for row in rows("whole") if int(row["step"]) >= step]
    assert int(rows("child")[0]["step"]) == step


def test_the_options_are_those_of_the_new_command(train: Command) -> None:
    """What an optimiser is told, not what it counts."""
    pytest.importorskip("schedulefree")
    train(*FREE, "optimizer.lr=1e-2", "max_steps=4", "out=parent")
    train(*FREE, "optimizer.lr=5e-3", "resume_from=parent", "max_steps=5", "out=child")
    (state,) = groups_of(torch.load("child/checkpoints/step-00000005.ckpt", weights_only=True))
    assert (state["lr"], state["k"]) == (5e-3, 5) and state["lr_max"] == pytest.approx(4e-3)


def test_callbacks_that_go_on_and_those_that_begin_are_told(train: Command) -> None:
    counts = "{_target_: my_exact_parts.Counts}"
    train(f"+trainer.callbacks=[{counts}]", "max_steps=2", "out=parent")
    both = f"+trainer.callbacks=[{counts},{{_target_: my_exact_parts.Other}}]"
    outcome = train(both, "resume_from=parent", "max_steps=3", "out=child")
    assert "callbacks taken over: Counts\n" in outcome.out
    assert "callbacks that start with a fresh state: Other\n" in outcome.out
    best = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: train/loss}"
    outcome = train(f"trainer.callbacks=[{best}]", "resume_from=parent", "max_steps=3", "out=new")
    assert "callbacks that start with a fresh state: ModelCheckpoint\n" in outcome.out
    assert "callbacks of that run alone, so they are left out: Counts\n" in outcome.out


def test_another_number_of_heads_is_another_network(train: Command) -> None:
    train("max_steps=2", "out=parent")
    on = ("resume_from=parent", "max_steps=3")
    refused = train(*on, "model.num_heads=4", "out=child", code=1)
    assert "model.num_heads is 2 there and 4 here" in refused.err
    assert "repeat model.num_heads=2" in refused.err and "Traceback" not in refused.err
    outcome = train(*on, "kind=eps", "out=child")
    assert "kind: there v, now eps" in outcome.out
