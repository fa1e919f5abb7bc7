"""With several seeds, what each setting changes against another at the same seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from sag_dit.cli.composing import changed
from sag_dit.cli.keys import Evaluate as Keys
from sag_dit.cli.measurements import make_measurements
from sag_dit.cli.rows import make_rows
from sag_dit.study.measurement import base_name
from sag_dit.study.results import Record, Result, combine, compared

Evaluate = Callable[..., Any]


def result(name: str, fids: dict[int, float]) -> Result:
    records = {
        f"{name}-{seed}": Record({"fid": fid}, {}, {"seed": seed}) for seed, fid in fids.items()
    }
    return combine(name, {}, records)


def test_pairs_cancel_what_seeds_have_in_common() -> None:
    plain, guided = compared(
        [
            result("plain", {0: 10.0, 1: 20.0, 2: 30.0}),
            result("guided", {0: 9.0, 1: 19.5, 2: 28.5}),
        ],
        None,
    )
    assert (plain.against, plain.change) == (None, {})
    assert guided.against == "plain"
    assert guided.change == {"fid": pytest.approx((-1.0, 0.5 / 3**0.5))}


def test_another_setting_can_be_the_base() -> None:
    rows = [result(name, {0: fid, 1: fid}) for name, fid in (("a", 1.0), ("b", 3.0), ("c", 4.0))]
    assert [each.change for each in compared(rows, "b")] == [
        {"fid": (-2.0, 0.0)},
        {},
        {"fid": (1.0, 0.0)},
    ]


@pytest.mark.parametrize("seeds", [{0: 1.0}, {0: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0}])
def test_other_seeds_are_not_compared(seeds: dict[int, float]) -> None:
    base = result("base", {0: 1.0} if len(seeds) == 1 else {0: 1.0, 1: 1.0})
    assert compared([base, result("other", seeds)], None)[1].change == {}


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        (1, "against=cgf: with one seed nothing is told of changes; add seeds=3"),
        (2, "against=cgf: expected the name of a setting, one of 'unguided', 'cfg', 'sag', "),
    ],
)
def test_a_base_that_cannot_be_is_refused_before_drawing(
    draw: Evaluate, seeds: int, told: str
) -> None:
    outcome = draw(f"seeds={seeds}", "against=cgf")
    assert (outcome.code, outcome.evaluations) == (1, 0)
    assert told in outcome.err


@pytest.mark.parametrize("against", ["CFG 1.5", "cfg"])
def test_a_base_goes_by_its_name_and_by_its_key(
    defaults: Keys, kept_references: Path, monkeypatch: pytest.MonkeyPatch, against: str
) -> None:
    monkeypatch.setenv("SAG_DIT_CACHE", str(kept_references))
    config = changed("evaluate", defaults, {"ckpt": "digits", "seeds": 2, "num_images": 30})
    measurements = make_measurements(make_rows(config, None), torch.device("cpu"))
    assert base_name(measurements, against) == "CFG 1.5"
    assert base_name(measurements, None) is None


def test_what_is_no_number_is_told_as_none() -> None:
    broken = {
        str(seed): Record({"fid": fid}, {}, {"seed": seed})  # type: ignore[dict-item]
        for seed, fid in ((0, 1.0), (1, None))
    }
    other = compared([result("plain", {0: 1.0, 1: 2.0}), combine("broken", {}, broken)], None)[1]
    change, error = other.change["fid"]
    assert math.isnan(change) and math.isnan(error)
    assert math.isnan(other.spread["fid"])


def test_the_command_tells_them(draw: Evaluate) -> None:
    few = ("metrics=[fid,is]", "confidence.repeats=0", "seeds=2", "against=cfg")
    outcome = draw("compare.cfg_sag.sag_scale=0.5", *few)
    rows = {row["name"]: row for row in outcome.results}
    base = [seed["metrics"]["fid"] for seed in rows["CFG 1.5"]["seeds"]]
    own = [seed["metrics"]["fid"] for seed in rows["CFG 1.5 + SAG 0.5"]["seeds"]]
    differences = [a - b for a, b in zip(own, base, strict=True)]
    change, error = rows["CFG 1.5 + SAG 0.5"]["change"]["fid"]
    assert change == pytest.approx(mean(differences))
    assert error == pytest.approx(stdev(differences) / 2**0.5)
    assert "against CFG 1.5 at the same seeds" in outcome.out
    assert "…" not in outcome.out.rpartition("setting ")[2]
    assert f"{change:+.1f}"[:3] in outcome.out.split("against CFG 1.5")[0]
    with (outcome.folder / "results.csv").open(newline="") as lines:
        written = {row["setting"]: row for row in csv.DictReader(lines)}
    assert float(written["CFG 1.5 + SAG 0.5"]["fid_change_error"]) == pytest.approx(error)
    assert not written["CFG 1.5"]["fid_change"]
    assert "against CFG 1.5: FD" in (outcome.folder / "index.html").read_text()
