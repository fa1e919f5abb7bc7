"""The page that shows what each method does, and its pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

import sag_dit
from benchmarks import method_pictures as made
from sag_dit.guidance import CFG, CFGZero
from sag_dit.methods import methods

RECORD = json.loads(made.RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> sag_dit.LoadedModel:
    return sag_dit.load(RECORD["ckpt"])


def test_every_method_is_drawn_or_its_absence_explained(model: sag_dit.LoadedModel) -> None:
    text = made.PAGE.read_text(encoding="utf-8")
    assert text == made.page(model, RECORD["ckpt"]), f"run python -m {made.__name__}"
    for method in methods():
        drawn = f"images/methods/{method.key}.webp" in text
        assert drawn != (f"- `{method.name}` (" in text)


def test_pictures_are_of_these_weights_and_settings(model: sag_dit.LoadedModel) -> None:
    now = {kind.key: made.inputs(model, kind) for kind in made.classes() if kind.key in RECORD}
    assert {"ckpt": RECORD["ckpt"], **now} == RECORD, f"run python -m {made.__name__}"
    files = {file.stem for file in made.PICTURES.glob("*.webp")}
    assert files == now.keys()


def test_a_picture_has_a_row_for_each_scale() -> None:
    digits = sag_dit.load("digits")
    sheet = np.asarray(made.picture(digits, CFG, steps=2))
    off, *guided = np.split(sheet[:, 44:], 4)
    alone = digits.sample("0", steps=2).images[0]
    np.testing.assert_array_equal(off[2:66, :64, 0], np.asarray(alone.resize((64, 64), 0)))
    assert all((row != off).any() for row in guided)


def test_what_decides_a_picture_is_in_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = sag_dit.load("digits")
    before = made.inputs(digits, CFG)
    monkeypatch.setattr(made, "STRENGTHS", (0.5, 1.0, 3.0))
    assert made.inputs(digits, CFG) != before
    told = made.refusal(digits, CFGZero)
    assert told is not None and "flow" in told
