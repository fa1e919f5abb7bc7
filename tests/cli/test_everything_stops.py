"""A run of many plugs at once, killed at random moments: it ends as one that never was."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli.test_going_on_stops import snapshots
from tests.cli.test_own_networks import PAGE
from tests.cli.test_train_stops import (
    assert_bit_equal,
    checkpoints,
    finish,
    kill,
    killed_within,
    logged,
    start,
    wait_for_checkpoint,
)
from tests.pages import ROOT

STEPS = 40
OBJECTIVE = """
import my_repa


class Averaged(my_repa.Repa):
    averaged = True
"""
SETTINGS = (
    "experiment=folder",
    "data.root=shards",
    "data.channels=1",
    "data.class_names=[cat,dog]",
    "data.batch_size=8",
    "data.held_out=0.2",
    "resolution=8",
    "model._target_=my_net.Mine",
    "model.width=16",
    "objective._target_=my_averaged.Averaged",
    "objective.width=16",
    "optimizer=muon",
    "optimizer.lr=1e-3",
    "optimizer.weight_decay=0.1",
    "param_groups=[no_decay,{layer_decay: 0.8},{match: 'label', lr: 3e-3}]",
    "schedule=cosine",
    "ema.decay=0.9",
    "ema.further={decays:[0.8],sigma_rel:[0.05,0.1]}",
    "every_n_steps.snapshot=2",
    "keep.snapshots=5",
    "keep.best=2",
    "keep.last=3",
    "every_n_minutes.checkpoint=0.01",
    "every_n_steps.checkpoint=4",
    "every_n_steps.log=5",
    "every_n_steps.validation=10",
    "every_n_steps.preview=1000",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.gradient_clip_val=1",
    f"max_steps={STEPS}",
)


def shards(folder: Path) -> None:
    """Images and their classes in two tar files, in WebDataset's layout."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"train-{number}.tar", "w") as archive:
            for index in range(14):
                picture = io.BytesIO()
                Image.new("L", (10, 9), 9 * index + number).save(picture, "PNG")
                members = {"png": picture.getvalue(), "cls": str(index % 2).encode()}
                for ending, content in members.items():
                    told = tarfile.TarInfo(f"{number}{index:03d}.{ending}")
                    told.size = len(content)
                    archive.addfile(told, io.BytesIO(content))


@pytest.fixture
def plugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network and the objective of docs/networks.md, and shards, in the working directory."""
    for name, text in (*PAGE.files.items(), ("my_averaged.py", OBJECTIVE)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def state(out: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint and of the export, averages and optimiser included."""
    last = torch.load(checkpoints(out)[-1], weights_only=True)
    assert last["global_step"] == steps
    held = last["optimizer_states"][0]["state"]
    moments = {f"{i}.{n}": value for i, each in held.items() for n, value in each.items()}
    rates = [group["lr"] for group in last["optimizer_states"][0]["param_groups"]]
    exported = {f"exported.{n}": t for n, t in load_file(out / "model.safetensors").items()}
    return {**last["state_dict"], **moments, "rates": torch.tensor(rates), **exported}


def killed_at_random(out: Path, chance: random.Random, kills: int, begin: Callable[[], Any]) -> int:
    """Start a run and kill it, so many times or until it has ended; return how many kills."""
    for killed in range(kills):
        process = begin()
        seen = checkpoints(out)
        # Some die while they start or take over, the others soon after a new checkpoint.
        if chance.random() < 0.7:
            wait_for_checkpoint(process, out, int(seen[-1].stem.split("-")[1]) if seen else 0)
            time.sleep(chance.uniform(0, 0.4))
        else:
            time.sleep(chance.uniform(0, 12))
        if process.poll() is not None:
            process.communicate()
            return killed
        kill(process)
    return kills


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kills_of_a_run_of_many_plugs(plugs: Path, seed: int) -> None:
    """Shards, a network and an objective of one's own, Muon, groups, averages, snapshots."""
    out, chance, killed, runs = plugs / "run0", random.Random(seed), 0, 0
    finish(plugs / "whole", settings=SETTINGS)
    whole = state(plugs / "whole")
    assert any(name.startswith("averaged_objective.") for name in whole)
    while killed < 6:
        out = plugs / f"run{runs}"
        begin = lambda out=out: start(out, settings=SETTINGS)  # noqa: E731
        killed += killed_at_random(out, chance, 6 - killed, begin)
        runs += 1
    finish(out, settings=SETTINGS)
    assert_bit_equal(state(out), whole)
    assert logged(out) == logged(plugs / "whole")
    assert snapshots(out) == snapshots(plugs / "whole")
    assert sorted({int(name.split("-")[1]) for name in snapshots(out)}) == [8, 16, 24, 32, STEPS]
    assert len(list((out / "checkpoints").glob("best-*"))) == 2


KILLER = """
import os
import signal

import torch

moment, save, replace = os.environ["KILLED"], torch.save, os.replace


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def saving(value, stream, *arguments, **options):
    if moment == "before":
        die()
    save(value, stream, *arguments, **options)
    if moment == "half":
        stream.truncate(stream.tell() // 2)
        stream.flush()
    if moment in ("half", "unnamed"):
        die()


def replacing(old, new):
    replace(old, new)
    if moment == "named" and str(new).endswith(".ckpt"):
        die()


torch.save, os.replace = saving, replacing
"""


@pytest.mark.slow  # Each death is that of a process.
def test_killed_while_it_takes_over_another_run(
    plugs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, while and after the first checkpoint is written, one after the other."""
    (plugs / "my_killer.py").write_text(KILLER)
    finish(plugs / "parent", "max_steps=8", "schedule=constant", settings=SETTINGS)
    changed = ("resume_from=parent", "optimizer.lr=5e-4", "data.batch_size=16", "max_steps=20")
    finish(plugs / "whole", *changed, settings=SETTINGS)
    for moment in ("before", "half", "unnamed", "named"):
        monkeypatch.setenv("KILLED", moment)
        process = start(plugs / "run", *changed, "imports=[my_killer]", settings=SETTINGS)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == -9, printed
        assert bool(checkpoints(plugs / "run")) == (moment == "named")
    printed = finish(plugs / "run", *changed, settings=SETTINGS)
    assert "going on from step 8 of 20" in printed
    assert_bit_equal(state(plugs / "run", 20), state(plugs / "whole", 20))
    assert snapshots(plugs / "run") == snapshots(plugs / "whole")
    names = [
        [each.name for each in (plugs / n / "checkpoints").iterdir()] for n in ("run", "whole")
    ]
    assert sorted(names[0]) == sorted(names[1])


@pytest.mark.slow
@pytest.mark.long
def test_kills_of_a_run_that_goes_on_from_another(plugs: Path) -> None:
    """At random moments of the first second after its folder was claimed, and later."""
    finish(plugs / "parent", "max_steps=8", "schedule=constant", settings=SETTINGS)
    changed = ("resume_from=parent", "optimizer.lr=5e-4", "data.batch_size=16")
    finish(plugs / "whole", *changed, settings=SETTINGS)
    chance, killed, runs = random.Random(5), 0, 0
    while killed < 6:
        out = plugs / f"run{runs}"
        process = start(out, *changed, settings=SETTINGS)
        if chance.random() < 0.6:
            deadline = time.monotonic() + 60
            while not (out / "config.yaml").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            seen = checkpoints(out)
            wait_for_checkpoint(process, out, int(seen[-1].stem.split("-")[1]) if seen else 0)
        if killed_within(process, chance.uniform(0, 1)):
            killed += 1
        else:
            runs += 1
    finish(out, *changed, settings=SETTINGS)
    assert_bit_equal(state(out), state(plugs / "whole"))
    assert snapshots(out) == snapshots(plugs / "whole")
