"""``train.py track=fid``: metrics of images drawn during training."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sag_dit
from sag_dit.evaluation.classifier import bundled_classifier
from sag_dit.evaluation.reference import load_reference
from sag_dit.evaluation.suite import Suite

Command = Callable[..., Any]
ROOT = Path(__file__).parents[3]
SMALL = (
    *("experiment=digits", "model.hidden_size=48", "model.depth=2", "model.num_heads=3"),
    *("data.batch_size=16", "+sampling.batch_size=10", "max_steps=4", "out=run"),
    *("every_n_steps.log=3", "every_n_steps.checkpoint=4"),
)
TRACKED = ("track=fid", "track.every_n_steps=2", "track.num_images=25", "track.steps=2")


@pytest.fixture
def train(in_process: Command, kept_references: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Train a small model of the digits for four steps."""
    monkeypatch.setenv("SAG_DIT_CACHE", str(kept_references))

    def run(*arguments: str) -> Any:
        return in_process("train", *SMALL, *arguments)

    return run


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Return the tracked metrics by how many steps were made, from the run's table."""
    (file,) = (folder / "logs").rglob("metrics.csv")
    found: dict[int, dict[str, float]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            values = {k: float(v) for k, v in row.items() if k.startswith("metrics/") and v}
            if values:
                found[int(row["step"]) + 1] = values
    return found


def measured(folder: Path) -> dict[str, float]:
    """The metrics of a run's exported weights, which are those that were measured last."""
    model = sag_dit.load(folder)
    images = sag_dit.sample(model, [i % 10 for i in range(25)], steps=2, batch_size=10)
    extractor = bundled_classifier("digits")
    suite = Suite(extractor, load_reference("digits:report", extractor), ["fid", "recall"])
    suite.update(images, torch.arange(25))
    return {f"metrics/{name}": value for name, value in suite.compute().items()}


def test_the_averaged_weights_are_measured_every_so_often(train: Command) -> None:
    outcome = train(*TRACKED, "track.metrics=[fid,recall]", "track.best=true")
    assert outcome.code == 0, outcome.err
    values = logged(Path("run"))
    assert list(values) == [2, 4]
    expected = measured(Path("run"))
    assert values[4] == pytest.approx(expected, rel=1e-5)
    assert values[2] != pytest.approx(expected, rel=1e-3)

    best = min(values, key=lambda step: values[step]["metrics/fid"])
    (kept,) = Path("run/checkpoints").glob("best-fid-*.ckpt")
    assert kept.name == f"best-fid-{best:08d}.ckpt"


def test_features_go_by_their_name_and_by_their_class(train: Command) -> None:
    mapping = "{_target_: sag_dit.evaluation.classifier.bundled_classifier, name: digits}"
    found = []
    for place, features in enumerate(("auto", "digits", mapping)):
        few = ("max_steps=2", "every_n_steps.checkpoint=2", f"out=run{place}")
        outcome = train(*TRACKED, "track.metrics=[fid]", f"track.features={features}", *few)
        assert outcome.code == 0, outcome.err
        found.append(logged(Path(f"run{place}")))
    assert found[0][2] and found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_ranks_track_what_one_measures(
    tmp_path: Path, kept_references: Path, trainer: str
) -> None:
    """Three batches on two ranks: one rank has none of its own in the second turn."""
    ranks = (f"trainer={trainer}", "trainer.devices=2", "trainer.accelerator=cpu")
    subprocess.run(
        [sys.executable, ROOT / "train.py", *SMALL, *ranks, *TRACKED, "track.metrics=[fid,recall]"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "SAG_DIT_CACHE": str(kept_references)},
    )
    values = logged(tmp_path / "run")
    assert list(values) == [2, 4]
    # Sharded weights are gathered with other rounding than a copy of them.
    assert values[4] == pytest.approx(measured(tmp_path / "run"), rel=1e-3)


def test_measuring_changes_no_weight(train: Command, tmp_path: Path) -> None:
    for more in (("out=plain",), ("out=tracked", *TRACKED)):
        outcome = train(*more)
        assert outcome.code == 0, outcome.err
    plain, tracked = (sag_dit.load(name).sha256 for name in ("plain", "tracked"))
    assert plain == tracked


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("track.every_n_steps=0",), "track.every_n_steps=0: expected 1 or more"),
        (("track.num_images=1",), "track.num_images=1: expected 2 or more"),
        (("track.metrics=[fd]",), "metrics=fd: expected"),
        (("track.features=digit",), "track.features=digit: expected one of"),
        (("track.metrics=[is]", "track.best=true"), "the best checkpoint is chosen by fid"),
    ],
)
def test_misuse(train: Command, arguments: tuple[str, ...], told: str) -> None:
    outcome = train(*TRACKED, *arguments)
    assert outcome.code == 1
    assert told in outcome.err
    assert outcome.evaluations == 0
