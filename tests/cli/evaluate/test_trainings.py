"""``evaluate.py ckpt=[run1,run2]``: several trainings of one model, compared in pairs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import safetensors.torch

import sag_dit

Evaluate = Callable[..., Any]
BUNDLED = Path(sag_dit.__file__).parent / "checkpoints" / "digits"
ROWS = ("compare=none", "+compare.plain={}", "+compare.cfg={cfg_scale: 2}", "metrics=[fid]")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three models that differ in their weights alone."""
    made = []
    for name, factor in (("one", 1.0), ("two", 1.02), ("three", 0.97)):
        folder = tmp_path / name
        shutil.copytree(BUNDLED, folder)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        scaled = {key: value * factor for key, value in weights.items()}
        safetensors.torch.save_file(scaled, folder / "model.safetensors")
        made.append(folder)
    return made


def test_changes_are_over_trainings(draw: Evaluate, runs: list[Path]) -> None:
    listed = f"ckpt=[{','.join(map(str, runs))}]"
    outcome = draw(listed, "seeds=2", *ROWS)
    plain, guided = outcome.results
    assert [each["training"] for each in plain["seeds"]] == [0, 0, 1, 1, 2, 2]
    assert plain["facts"]["model"] == ["one", "two", "three"]
    # The change of each training is the mean over its seeds.
    pairs = zip(guided["seeds"], plain["seeds"], strict=True)
    changes = [a["metrics"]["fid"] - b["metrics"]["fid"] for a, b in pairs]
    by_training = [fmean(changes[place : place + 2]) for place in (0, 2, 4)]
    error = stdev(by_training) / 3**0.5
    assert guided["change"]["fid"] == pytest.approx([fmean(by_training), error])
    assert "3 trainings of 2 seeds each" in outcome.out
    assert "over trainings and over samplings: FD" in outcome.out
    # What was measured of one model is not measured again, nor is any of them.
    (alone,) = draw(f"ckpt={runs[1]}", "seeds=2", "compare=none", "metrics=[fid]").results
    assert draw(listed, "seeds=2", *ROWS).evaluations == 0
    assert [each["metrics"] for each in alone["seeds"]] == [
        each["metrics"] for each in plain["seeds"][2:4]
    ]


def test_models_that_are_no_trainings_of_one_are_refused(draw: Evaluate, runs: list[Path]) -> None:
    outcome = draw(f"ckpt=[{runs[0]},patches]", "compare=none")
    assert outcome.code == 1
    assert "expected trainings of one model" in outcome.err
    outcome = draw(f"ckpt=[{runs[0]},{runs[0]}]", "seeds=2", "compare=none")
    assert outcome.code == 1 and "each once" in outcome.err
    assert outcome.evaluations == 0
