"""The pictures of README and docs are what the code would draw today, by what goes into them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import sag_dit
from benchmarks import digits_guidance, emoji_card, frontier, pictures, scaling
from benchmarks.pictures import IMAGES, ROOT, Picture, draw, ingredients, recorded


@pytest.mark.parametrize("name", recorded())
def test_a_picture_is_of_todays_settings_weights_and_code(name: str) -> None:
    known = recorded()[name]
    picture = Picture(known["file"], known["arguments"])
    told = f"{name}.png is not what is drawn today: run python -m benchmarks.pictures"
    assert ingredients(picture) == known, told
    assert (IMAGES / f"{name}.png").is_file()


def test_the_plot_is_of_todays_rows_weights_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    known = json.loads((IMAGES / "digits_guidance.json").read_text("utf-8"))
    told = "the plot is not what is drawn today: run python -m benchmarks.digits_guidance"
    assert digits_guidance.ingredients(**known["counts"]) == known, told
    monkeypatch.setattr(digits_guidance, "CLASSIFIER_STEPS", 10)
    assert digits_guidance.ingredients(**known["counts"]) != known


def test_the_neighbours_are_of_todays_weights_and_code() -> None:
    known = json.loads((IMAGES / "emoji_neighbours.json").read_text("utf-8"))
    told = "run python -m benchmarks.emoji_card --num 0 --picture docs/images/emoji_neighbours.png"
    assert json.loads(json.dumps(emoji_card.ingredients(sag_dit.load("emoji")))) == known, told


def test_the_frontier_is_of_todays_settings_and_weights() -> None:
    known = json.loads((IMAGES / "frontier.json").read_text("utf-8"))
    assert frontier.ingredients() == known, "run python -m benchmarks.frontier"


def test_the_plot_of_scaling_shows_every_part() -> None:
    assert {each.part for each in scaling.read()} == set(scaling.PARTS)


def test_every_picture_says_what_went_into_it() -> None:
    drawn = {file.stem for file in IMAGES.glob("*.png")}
    assert drawn == {file.stem for file in IMAGES.glob("*.json")} != set()


def test_readme_shows_such_a_picture() -> None:
    shown = re.findall(r"!\[[^]]*\]\(docs/images/(\w+)\.png\)", (ROOT / "README.md").read_text())
    assert shown and set(shown) <= recorded().keys()


def test_make_sample_draws_what_readme_shows() -> None:
    told = subprocess.run(
        ["make", "-n", "sample"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (line,) = (each for each in told.splitlines() if "sample.py" in each)
    _, _, *arguments = shlex.split(line)
    assert ingredients(Picture("grid.png", arguments))["pixels"] == recorded()["emoji"]["pixels"]


def test_other_settings_or_code_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = Picture("grid.png", ["ckpt=digits", "num_images=2"])
    known = ingredients(first)
    assert ingredients(first) == known
    changed = ingredients(replace(first, arguments=[*first.arguments, "sag_scale=0.31"]))
    assert changed["pixels"] != known["pixels"] and changed["code"] == known["code"]
    other = ingredients(replace(first, arguments=["ckpt=patches", "num_images=2"]))
    assert other["pixels"] != known["pixels"]
    # The page's code, with one more line.
    (tmp_path / "sag_dit" / "output").mkdir(parents=True)
    for module in pictures.CODE:
        source = (ROOT / f"sag_dit/output/{module}.py").read_text("utf-8")
        more = "\nCELL = 64\n" if module == "gallery" else ""
        (tmp_path / f"sag_dit/output/{module}.py").write_text(source + more, "utf-8")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    assert ingredients(first)["code"] != known["code"]


def test_a_picture_is_drawn_with_its_ingredients_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    picture = Picture("grid.png", ["ckpt=digits", "num_images=2", "steps=2", "batch_size=2"])
    file = draw("two", picture, tmp_path)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert recorded(tmp_path) == {"two": ingredients(picture)}
