"""Runs with further averages, and those that go on from another one: killed, and on two ranks."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sag_dit.checkpoints import load
from tests.cli.test_train_stops import (
    SMALL,
    STEPS,
    assert_bit_equal,
    checkpoints,
    finish,
    kill,
    start,
    wait_for_checkpoint,
    weights,
)

FURTHER = (
    "ema.further={decays:[0.9],sigma_rel:[0.05,0.1]}",
    "every_n_steps.snapshot=2",
    "keep.snapshots=5",
    "keep.best=2",
    "keep.last=3",
    "every_n_minutes.checkpoint=0.01",
)


def snapshots(out: Path) -> dict[str, str]:
    """The files of the averages, by their content; what a kill left beside them is none."""
    files = sorted((out / "averages").glob("step-*"))
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


@pytest.mark.slow  # a dozen processes
@pytest.mark.parametrize("goes_on", [False, True], ids=["fresh", "resume_from"])
def test_kills_at_random_moments(tmp_path: Path, goes_on: bool) -> None:
    """While it starts, takes over a run, trains, and writes checkpoints and averages."""
    arguments: tuple[str, ...] = FURTHER
    if goes_on:
        finish(tmp_path / "parent", *FURTHER, "max_steps=8")
        arguments += (f"resume_from={tmp_path / 'parent'}", "optimizer.lr=1e-3")
    finish(tmp_path / "whole", *arguments)
    out, chance, killed = tmp_path / "run", random.Random(int(goes_on)), 0
    while killed < 5:
        process = start(out, *arguments)
        seen = checkpoints(out)
        wait_for_checkpoint(process, out, int(seen[-1].stem.split("-")[1]) if seen else 0)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is not None:
            process.communicate()
            break
        kill(process)
        killed += 1
    finish(out, *arguments)
    assert killed > 0
    assert_bit_equal(weights(out), weights(tmp_path / "whole"))
    # Evenly spaced, and the newest: bounded, and the same whichever were written twice.
    assert snapshots(out) == snapshots(tmp_path / "whole")
    steps = sorted({int(name.split("-")[1]) for name in snapshots(out)})
    assert steps == [8, 16, 24, 32, STEPS]
    last = [int(each.stem.split("-")[1]) for each in checkpoints(out)]
    assert len(last) <= 3 and last[-1] == STEPS
    assert len(list((out / "checkpoints").glob("best-*"))) == 2
    assert not [each.name for each in (out / "averages").iterdir() if each.name.startswith(".")]
    for ema in (0.9, 0.1, 0.15):
        states = [
            dict(load(each, ema=ema).denoiser.state_dict()) for each in (out, tmp_path / "whole")
        ]
        assert_bit_equal(*states)


@pytest.mark.slow  # two processes, three times
def test_copied_and_sharded_ranks_go_on_from_one_to_the_same_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a run of one rank: DDP and FSDP2 on two end bit-equal, stopped once or not."""
    # Ranks share out the cores by themselves.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    finish(tmp_path / "parent", *FURTHER, "max_steps=4")
    ranked = (
        *FURTHER,
        f"resume_from={tmp_path / 'parent'}",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "data.batch_size=8",
    )
    printed = finish(tmp_path / "ddp", *ranked, "trainer=ddp", "max_steps=8")
    assert printed.count("optimiser: the state of 31 parameters taken over") == 1
    assert "trainer.devices: there 1, now 2" in printed
    finish(tmp_path / "fsdp", *ranked, "trainer=fsdp", "max_steps=6")
    finish(tmp_path / "fsdp", *ranked, "trainer=fsdp", "max_steps=8")
    exported = [load_file(tmp_path / each / "model.safetensors") for each in ("fsdp", "ddp")]
    assert_bit_equal(*exported)
    assert snapshots(tmp_path / "fsdp") == snapshots(tmp_path / "ddp")
    # Snapshots alone tell an average of a sharded run, of their last step.
    states = [
        dict(load(tmp_path / each, ema=0.15).denoiser.state_dict()) for each in ("fsdp", "ddp")
    ]
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="in pieces that only unpickling reads"):
        load(tmp_path / "fsdp", ema=0.9)


@pytest.mark.slow  # two processes, twice
@pytest.mark.parametrize(
    "changed",
    [
        ("resume_from=parent", "resume_optimizer=false"),
        (
            *("experiment=finetune", "ckpt=parent", "data=digits", "data.classes=[3,4]"),
            *("finetune.optimizer=true", "finetune.weights=raw"),
        ),
    ],
    ids=["resume_from", "finetune"],
)
def test_an_optimiser_begins_anew_on_copied_and_sharded_ranks_alike(
    changed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its state, or that of the new rows alone: as if there never had been any."""
    monkeypatch.chdir(tmp_path)
    finish(tmp_path / "parent", "max_steps=2")
    settings = (
        *(SMALL if "resume_from=parent" in changed else ()),
        *(*changed, "data.batch_size=16", "max_steps=5"),
        *("trainer.accelerator=cpu", "trainer.devices=2"),
    )
    for strategy in ("fsdp", "ddp"):
        printed = finish(tmp_path / strategy, f"trainer={strategy}", settings=settings)
        assert "with a fresh state" in printed or "fresh for 1 other" in printed
    exported = [load_file(tmp_path / each / "model.safetensors") for each in ("fsdp", "ddp")]
    assert_bit_equal(*exported)
