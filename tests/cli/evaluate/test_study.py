"""``sag_dit.study.compare`` measures what ``evaluate.py`` does with the same settings and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sag_dit
from sag_dit.guidance import CFG, SAG
from sag_dit.sampler import Ancestral
from sag_dit.sampling import Settings
from sag_dit.study.results import json_values

Evaluate = Callable[..., Any]


@pytest.fixture
def small(
    kept_references: object, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., sag_dit.study.Comparison]:
    """``compare`` on the bundled digits, as the fixture ``draw`` measures them."""
    monkeypatch.setenv("SAG_DIT_CACHE", str(kept_references))
    model = sag_dit.load("digits")

    def run(settings: dict[str, Any], **options: Any) -> sag_dit.study.Comparison:
        few = {"steps": 2, "num_images": 30, "batch_size": 15, "progress": False}
        return sag_dit.study.compare(model, settings, **{**few, **options})

    return run


def test_the_numbers_are_those_of_the_command(draw: Evaluate, small: Callable[..., Any]) -> None:
    told = {row["name"]: row for row in draw("seeds=2", "seed=3").results}
    comparison = small({"plain": [], "cfg": [CFG(1.5)], "sag": [SAG(1.0)]}, seeds=2, seed=3)
    for name, theirs in (("plain", "unguided"), ("cfg", "CFG 1.5"), ("sag", "SAG 1")):
        mine, other = comparison[name], told[theirs]
        assert (mine.metrics, mine.spread) == (other["metrics"], other["spread"])
        assert {key: list(value) for key, value in mine.change.items()} == other["change"]
        assert list(mine.identities) == other["identities"]
        assert json_values(mine.facts) == other["facts"]
    assert comparison["cfg"].against == "plain"


def test_with_one_seed_the_spread_is_that_of_halves(
    draw: Evaluate, small: Callable[..., Any]
) -> None:
    (told,) = draw("cfg_scale=1.5", "metrics=[is,fid]").results
    comparison = small({"cfg": [CFG(1.5)]}, metrics=["is", "fid"])
    (mine,) = comparison
    assert list(mine.metrics) == ["is", "fid"]
    assert (mine.metrics, mine.spread) == (told["metrics"], told["spread"])
    assert mine.change == {}
    assert "± standard error, from 10 random halves of the images" in str(comparison)


def test_settings_may_differ_in_more_than_guidance(small: Callable[..., Any]) -> None:
    settings = Settings(Ancestral(), steps=3, guidance=(CFG(1.5), CFG(1.1)), batch_size=10)
    first, other, again = small({"plain": [], "other": settings, "again": []}, metrics=["fid"])
    assert first.facts["sampler"] != other.facts["sampler"]
    assert (first.facts["steps"], other.facts["steps"]) == (2, 3)
    assert list(other.facts["terms"]) == ["cfg", "cfg_2"]
    assert first.metrics == again.metrics != other.metrics


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"settings": {}}, "settings={}: expected names with their guidance"),
        ({"seeds": 0}, "seeds=0: expected a whole number, 1 or more"),
        ({"repeats": 1}, "repeats=1: expected 0, or 2 or more"),
        ({"metrics": ["fd"]}, "metrics=fd: expected fid"),
        ({"features": "digit"}, "features=digit: expected one of clip, digits, dinov2"),
        ({"reference": "no.npz"}, "reference=no.npz: no such file or folder"),
        ({"steps": 2000}, "steps=2000"),
        ({"num_images": 3}, "precision and recall look at k=3 neighbours"),
        ({"against": "b", "seeds": 2}, "against=b: expected the name of a setting, one of 'a'"),
    ],
)
def test_misuse_is_told_before_anything_is_drawn(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("sag_dit.study.comparison.drawn", None)
    with pytest.raises(ValueError, match=told):
        small(**{"settings": {"a": []}, **options})
