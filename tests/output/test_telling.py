"""Settings in words; that commands and Python draw the same is in tests/cli/test_recipes.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import sag_dit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance import CFG, FDG, PAG, SAG, SLG, BlurGuidance, Term
from sag_dit.output.telling import Recipe, command, python, words
from sag_dit.sampler import DDIM
from sag_dit.sampler.diffusers import DiffusersSampler


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return sag_dit.load("digits").denoiser


@pytest.mark.parametrize(
    ("guidance", "told"),
    [
        ([], "no guidance"),
        ([CFG(1.0), SAG(0.0)], "no guidance"),
        ([CFG(1.5)], "CFG 1.5"),
        (
            [CFG(1.5), SAG(0.5, layer=2, interval=(0.5, 1.0))],
            "SAG 0.5 in the second half, layer 2, beside CFG 1.5",
        ),
        ([SAG(1.0, interval=(0.0, 0.5))], "SAG 1 in the first half, layer 1"),
        (
            [SAG(2.0, layer=["blocks.1", "blocks.3"], quantile=0.7, threshold=1.0)],
            "SAG 2, layers 1, 3, quantile 0.7",
        ),
        (
            [PAG(3.0, layers=2), SLG(1.5, layers=[0, 3], interval=(0.01, 0.2))],
            "PAG 3, layer 2 and SLG 1.5 from 1 % to 20 % of the steps, layers 0, 3",
        ),
        (
            [BlurGuidance(0.25, blur_sigma=0.125, schedule="linear")],
            "Blur guidance 0.25, rising evenly, blur sigma 0.125",
        ),
        ([FDG(2.0, low=1.25)], "FDG 2, low 1.25"),
        (
            [SAG(1.0, interval=(None, 400.0), interval_in="t")],
            "SAG 1 at t up to 400, layer 1",
        ),
        (
            [SAG(1.0, interval=(0.2, 5.0), interval_in="sigma", schedule=lambda p: p)],
            "SAG 1 at sigma / alpha above 0.2 up to 5, by a schedule of its own, layer 1",
        ),
    ],
)
def test_words(denoiser: Denoiser, guidance: list[Term], told: str) -> None:
    assert words(guidance, denoiser) == told


def test_what_cannot_be_written_is_said() -> None:
    steep = Recipe("digits", DDIM(), guidance={"sag": SAG(1.0, schedule=lambda p: p)})
    for write in (command, python):
        with pytest.raises(ValueError, match=r"schedule: a function in memory"):
            write(steep)

    class Mine(SAG):
        pass

    with pytest.raises(ValueError, match=r"Mine: put it into a file"):
        command(Recipe("digits", DDIM(), guidance={"mine": Mine(1.0)}))
    with pytest.raises(ValueError, match=r"max_rows=32: model\.sample does not take it"):
        python(Recipe("digits", DDIM(), beside={"max_rows": 32}))


def test_python_is_the_public_way() -> None:
    both = {"sag": SAG(0.5), "cfg": CFG(1.5)}
    sampler = DiffusersSampler("dpmpp_2m")
    recipe = Recipe("emoji", sampler, steps=20, guidance=both, classes=["heart"], num_images=1)
    assert python(recipe).splitlines() == [
        "import sag_dit",
        "from sag_dit import CFG, SAG",
        "",
        'model = sag_dit.load("emoji")',
        "out = model.sample(",
        '    ["heart"],',
        "    guidance=[SAG(0.5), CFG(1.5)],",
        '    sampler="dpmpp_2m",',
        "    steps=20,",
        "    seed=0,",
        ")",
    ]
    # One term needs no brackets, and a sampler with options of its own is made.
    one = replace(recipe, guidance={"sag": SAG(0.5)}, sampler=DDIM(0.5), seed=3)
    told = python(one)
    assert "    guidance=SAG(0.5),\n    sampler=DDIM(eta=0.5),\n" in told
    assert "from sag_dit.sampler import DDIM\n" in told


@pytest.mark.parametrize(
    ("recipe", "write", "said"),
    [
        (Recipe("", DDIM()), python, "made in memory"),
        (Recipe("", DDIM()), command, "made in memory"),
        (Recipe("digits", DDIM(), loading={"dtype": torch.bfloat16}), command, "only Python"),
        (Recipe("text", DDIM(), prompt=("a fox", "a hen")), command, "requests=FILE"),
    ],
)
def test_what_only_one_of_them_can_say(recipe: Recipe, write: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write(recipe)
