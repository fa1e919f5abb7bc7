"""Reference curves: what runs have logged, joined over seeds, drawn, told and compared with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import reference_curves
from benchmarks.reference_curves import compared, draw, joined, read, recipe, recorded, section
from sag_dit.cli.composing import compose

RUNS = [
    {"train/loss": {4: 1.0, 9: 0.5}, "val/loss": {9: 0.6}, "odd": {3: 1.0}},
    {"train/loss": {4: 3.0, 9: 0.7}, "val/loss": {9: 0.8}},
]


def curves() -> dict[str, Any]:
    return {"digits": {"arguments": recipe("digits", 10), "seeds": [0, 1], "columns": joined(RUNS)}}


@pytest.mark.parametrize("steps", [10, 4000])
def test_a_recipe_is_one_that_train_takes(steps: int) -> None:
    config = compose("train", recipe("digits", steps))
    assert config.max_steps == steps
    assert bool(config.track) == (steps >= 100), "a few steps are not worth an FD"


def test_published_curves_are_of_today_s_recipes() -> None:
    for experiment, known in recorded().items():
        told = f"{experiment} is trained otherwise today: run python -m benchmarks.reference_curves"
        assert reference_curves.weights_of(known["arguments"]) == known["weights"], told


def test_a_log_is_read_by_columns_without_those_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        rows = [["step", "epoch", "images/s", "train/loss", "val/loss"]]
        writer.writerows([*rows, [9, 0, 81.5, 0.25, ""], [9, 0, "", "", 0.5]])
    assert read(file) == {"train/loss": {9: 0.25}, "val/loss": {9: 0.5}}


def test_what_all_seeds_have_is_joined() -> None:
    columns = joined(RUNS)
    assert columns["train/loss"] == {"step": [4, 9], "values": [[1.0, 0.5], [3.0, 0.7]]}
    assert columns.keys() == {"train/loss", "val/loss"}


def test_the_page_and_a_comparison_tell_the_spread_over_seeds() -> None:
    assert "| `train/loss` | 9 | 0.6 | 0.14 |" in section(curves())
    (line,) = compared(curves()["digits"], {"train/loss": {4: 2.0, 9: 0.6 + 0.2 * 2**-0.5}})
    assert line.startswith("train/loss") and "(+1.0 deviations)" in line and "row      9" in line


def test_the_picture_has_a_row_for_each_recipe(tmp_path: Path) -> None:
    sizes = []
    for found in (curves(), {**curves(), "patches": curves()["digits"]}):
        draw(found, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][1] == pytest.approx(2 * sizes[0][1], abs=2)


def test_the_page_holds_the_table_of_the_published_curves() -> None:
    text = reference_curves.PAGE.read_text(encoding="utf-8")
    assert section(recorded()) in text, "run python -m benchmarks.reference_curves --draw"
