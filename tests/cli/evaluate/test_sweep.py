"""``evaluate.py -m``: one process for all settings, and the curves it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from sag_dit.cli.sweep import expand

Evaluate = Callable[..., Any]


def test_without_m_nothing_is_swept() -> None:
    assert expand(["ckpt=digits", "sag_scale=1"]) is None


def test_the_last_key_changes_fastest_and_other_arguments_stay() -> None:
    choices = expand(
        ["ckpt=a, (b)=c", "-m", "sag_scale=0,0.5", "--cfg", "sampler=ddim,ddpm", "x=[1,2]"]
    )
    assert choices is not None
    assert [choice.axes for choice in choices] == [
        {"sag_scale": 0, "sampler": "ddim"},
        {"sag_scale": 0, "sampler": "ddpm"},
        {"sag_scale": 0.5, "sampler": "ddim"},
        {"sag_scale": 0.5, "sampler": "ddpm"},
    ]
    assert choices[2].arguments == [
        *("ckpt=a, (b)=c", "--cfg", "x=[1,2]", "sag_scale=0.5", "sampler=ddim")
    ]


def test_ranges() -> None:
    choices = expand(["--multirun", "cfg_scale=range(1,2.5,0.5)"])
    assert choices is not None
    assert [choice.axes["cfg_scale"] for choice in choices] == [1.0, 1.5, 2.0]


def test_m_without_several_values_is_refused() -> None:
    with pytest.raises(ValueError, match="no key has several values"):
        expand(["-m", "sag_scale=1"])


def test_a_sweep_measures_each_setting_once_and_draws_curves(draw: Evaluate) -> None:
    few = ("metrics=[fid,is]", "confidence.repeats=0")
    outcome = draw("-m", "sag_scale=0,1", "guidance.sag.threshold=1,1.5", *few)
    results = outcome.results
    assert [result["axes"] for result in results] == [
        {"sag_scale": 0, "guidance.sag.threshold": 1},
        {"sag_scale": 0, "guidance.sag.threshold": 1.5},
        {"sag_scale": 1, "guidance.sag.threshold": 1},
        {"sag_scale": 1, "guidance.sag.threshold": 1.5},
    ]
    # Without SAG its threshold changes nothing: three settings, in rows of the network at a step.
    steps, images = 2, 30
    assert outcome.evaluations == steps * images * (1 + 2 + 2)
    metrics = [result["metrics"] for result in results]
    assert metrics[0] == metrics[1] and metrics[0] != metrics[2] != metrics[3]
    for name in ("trade_off", "sag_scale", "guidance.sag.threshold"):
        with Image.open(outcome.folder / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or ()) > 50

    more = draw("-m", "seed=0,1", "sag_scale=0,1", *few, "plots=false")
    # Settings that differ in their seed alone are one row; those of seed 0 are known.
    assert more.evaluations == steps * images * (1 + 2)
    assert [result["name"] for result in more.results] == ["unguided", "SAG 1"]
    assert [len(result["seeds"]) for result in more.results] == [2, 2]
    assert "over 2 seeds" in more.out
    assert not list(more.folder.glob("*.png"))


def test_each_setting_has_a_folder_within_the_one_that_is_stated() -> None:
    choices = expand(["-m", "out=runs", "seed=0,1", "optimizer.lr=0.001,0.002"])
    assert choices is not None
    placed = [choice.in_its_own_folder() for choice in choices]
    assert [each.out for each in placed] == [
        f"runs/seed={seed},optimizer.lr={rate}" for seed in (0, 1) for rate in ("0.001", "0.002")
    ]
    assert placed[0].arguments[:2] == choices[0].arguments[1:], "all else stays"


def test_folders_that_are_left_out_stay_as_they_are() -> None:
    for arguments in (["-m", "seed=0,1"], ["-m", "out=null", "seed=0,1"]):
        choices = expand(arguments)
        assert choices is not None
        assert [choice.in_its_own_folder() for choice in choices] == choices


def test_a_name_that_cannot_be_a_folder_s_is_made_one() -> None:
    choices = expand(["-m", "out='my runs'", "classes=[1,2],[3,4]"])
    assert choices is not None
    first, second = (choice.in_its_own_folder().out for choice in choices)
    assert first is not None and first.startswith("my runs/classes=_1,_2_-")
    assert second is not None and first != second and second.count("/") == 1
