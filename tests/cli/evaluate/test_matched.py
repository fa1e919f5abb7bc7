"""``evaluate.py matched=N``: below each setting CFG of the same effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sag_dit
from sag_dit.guidance import CFG, SAG

Evaluate = Callable[..., Any]
ROWS = (
    "compare=none",
    "+compare.plain={}",
    "+compare.cfg={cfg_scale: 2}",
    "+compare.both={sag_scale: 0.5, cfg_scale: 1.5, guidance: {sag: {branch: cond}}}",
    "metrics=[fid]",
    "matched=4",
)


def test_matches_are_those_of_compare(draw: Evaluate) -> None:
    outcome = draw("seeds=2", *ROWS)
    rows = {row["name"]: row for row in outcome.results}
    name = [*rows][2]
    # What is CFG alone has no match.
    assert [each.partition(", ")[2] for each in [*rows][3:]] == [
        f"w of {name}",
        f"w and passes of {name}",
        f"size of {name}",
    ]
    model = sag_dit.load("digits")
    terms = [SAG(0.5, branch="cond"), CFG(1.5)]
    found = sag_dit.study.compare(
        model, {name: terms}, num_images=30, steps=2, batch_size=15, seeds=2,
        metrics=["fid"], repeats=0, progress=False, matched=4,
    )  # fmt: skip
    for result in found:
        assert result.metrics["fid"] == pytest.approx(rows[result.name]["metrics"]["fid"], rel=1e-6)
    # Nothing is measured again, effects included.
    assert draw("seeds=2", *ROWS).evaluations == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["matched=-1"], "matched=-1"),
        (["+compare.x={matched: 3}"], "compare.x.matched: all rows have the same"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    draw: Evaluate, arguments: list[str], message: str
) -> None:
    outcome = draw("compare=none", *arguments)
    assert outcome.code == 1
    assert message in outcome.err


def test_images_on_disk_have_nothing_to_match(evaluate: Evaluate) -> None:
    outcome = evaluate("samples=here.npz", "matched=4")
    assert outcome.code == 1
    assert "matched=4: images on disk have no guidance to match" in outcome.err


def test_a_sweep_has_no_matches(evaluate: Evaluate) -> None:
    outcome = evaluate("-m", "ckpt=digits", "sag_scale=0.1,0.2", "matched=4")
    assert outcome.code == 1
    assert "matched=4 beside -m: a sweep is a curve" in outcome.err
