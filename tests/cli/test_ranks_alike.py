"""One rank, two copied ranks and two sharded ones: the same weights, averages and logs.

Ranks draw times, noise and label dropout from streams of their own, so that runs of another number
of ranks are other runs. Here all of it follows from the image instead, and only rounding is left.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.test_own_networks import PAGE
from tests.cli.test_train_stops import assert_bit_equal, checkpoints, finish, start
from tests.pages import ROOT

PLUGS = '''
import my_net
import my_repa
import torch


class Still(my_net.Mine):
    """Without label dropout, which follows the rank."""

    def forward(self, x, t, y):
        self.training = False
        return super().forward(x, t, y)


class Told(my_repa.Repa):
    """Times and noise follow from the image."""

    averaged = True

    def losses(self, denoiser, x_0, cond, level, eps, pixels):
        place = x_0.flatten(1).mean(1).add(1).mul(7.3).remainder(1)
        level = denoiser.process.level(denoiser.process.time_at(place))
        eps = (x_0 * 91.7).sin() * 1.4
        return super().losses(denoiser, x_0, cond, level, eps, pixels)
'''
SETTINGS = (
    "experiment=digits",
    "model._target_=my_plugs.Still",
    "model.width=16",
    "objective._target_=my_plugs.Told",
    "objective.width=16",
    "data.batch_size=16",
    "param_groups=[{layer_decay: 0.8},{match: label, lr_scale: 2}]",
    "every_n_steps.checkpoint=2",
    "every_n_steps.validation=4",
    "every_n_steps.log=1",
    "every_n_steps.preview=1000",
    "trainer.accelerator=cpu",
    "trainer.gradient_clip_val=1",
    "max_steps=6",
)
AVERAGES = (
    "ema.decay=0.9",
    "ema.further={decays:[0.8],sigma_rel:[0.1]}",
    "every_n_steps.snapshot=2",
)
# Rounding of a gradient near zero turns the sign that Lion steps by, Newton-Schulz runs in
# bfloat16, and 8 bits round the state: a few steps of single weights are others then.
KINDS: dict[str, tuple[tuple[str, ...], float]] = {
    "adamw": (("+optimizer.eps=1e-3", "+optimizer.amsgrad=true", *AVERAGES), 1e-4),
    "sgd": (("optimizer=sgd", "optimizer.lr=0.1", *AVERAGES), 1e-4),
    "muon": (("optimizer=muon", "+optimizer.eps=1e-3", *AVERAGES), 0.05),
    "lion": (("optimizer=lion", "optimizer.lr=1e-3", *AVERAGES), 0.05),
    "schedule_free": (
        ("optimizer=schedule_free", "+optimizer.eps=1e-3", "ema.decay=null"),
        1e-4,
    ),
    "adamw8bit": (("optimizer=adamw8bit", "+optimizer.eps=1e-3", *AVERAGES), 0.05),
    "adafactor": (("optimizer=adafactor", "optimizer.lr=1e-2", *AVERAGES), 1e-3),
}
UNSHARDED = {"adafactor", "adamw8bit"}
PACKAGES = {"schedule_free": "schedulefree", "adamw8bit": "bitsandbytes", "lion": "timm"}
MEASURED = {"images/s", "memory_gb", "mfu"}


@pytest.fixture
def plugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (*PAGE.files.items(), ("my_plugs.py", PLUGS)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}:{before}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def trained(out: Path) -> dict[str, Tensor]:
    """What is exported, and the snapshots of an average."""
    kept = {
        f"{each.name}/{name}": tensor
        for each in (out / "averages").glob("step-*")
        for name, tensor in load_file(each).items()
    }
    return {**load_file(out / "model.safetensors"), **kept}


def logged(out: Path) -> list[dict[str, float]]:
    with (out / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{n: float(v) for n, v in row.items() if v and n not in MEASURED} for row in rows]


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return float(torch.cat([(left[n] - right[n]).flatten() for n in left]).norm())


@pytest.mark.slow  # Three runs, two of two processes each.
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_and_log_alike(kind: str, plugs: Path) -> None:
    """A network, an objective with an averaged module, groups, averages, rates, norms, losses."""
    if importlib.util.find_spec(PACKAGES.get(kind, "torch")) is None:
        pytest.skip(f"{PACKAGES[kind]} is not installed")
    options, close = KINDS[kind]
    settings = (*SETTINGS, *options)
    finish(plugs / "one", "trainer.devices=1", settings=settings)
    finish(plugs / "ddp", "trainer=ddp", "trainer.devices=2", settings=settings)
    sharded = ("trainer=fsdp", "trainer.devices=2")
    names = ["one", "ddp", "fsdp"]
    if kind in UNSHARDED:
        process = start(plugs / "fsdp", *sharded, settings=settings)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode != 0 and "Traceback" not in printed
        assert "it cannot train weights that are split over ranks" in printed
        names.remove("fsdp")
    else:
        finish(plugs / "fsdp", *sharded, settings=settings)
        # Stopped once, which changes no bit.
        finish(plugs / "parts", *sharded, "max_steps=4", settings=settings)
        finish(plugs / "parts", *sharded, settings=settings)
        assert_bit_equal(trained(plugs / "parts"), trained(plugs / "fsdp"))
    first = torch.load(checkpoints(plugs / "one")[0], weights_only=True)["state_dict"]
    assert "objective.projector.0.weight" in first
    found, rows = [trained(plugs / n) for n in names], [logged(plugs / n) for n in names]
    moved = distance(found[0], {n: torch.zeros_like(t) for n, t in found[0].items()})
    wanted = {"train/grad_norm", "train/weight_norm", "train/mse", "train/likeness", "val/loss"}
    seen = {name for row in rows[0] for name in row}
    assert wanted <= seen
    assert any(n.startswith("train/lr/") for n in seen) and any("of_4" in n for n in seen)
    for other, log in zip(found[1:], rows[1:], strict=True):
        assert distance(found[0], other) <= close * moved
        assert [row.keys() for row in log] == [row.keys() for row in rows[0]]
        for one, two in zip(rows[0], log, strict=True):
            for name, value in one.items():
                assert two[name] == pytest.approx(value, rel=10 * close, abs=1e-6), name
