"""Results side by side: as text, in a notebook, and as data."""

from __future__ import annotations

import html.parser
import json
import math
from dataclasses import replace

import pytest

from sag_dit.guidance import CFG
from sag_dit.study import Comparison, compare
from sag_dit.study.comparison import clear_changes
from sag_dit.study.results import Metric, Record, Result, combine, compared
from sag_dit.study.variance import difference
from tests.study.models import small_model

METRICS = {"fid": Metric("FD", higher=False), "is": Metric("IS", higher=True)}
PLAIN = {0: (10.0, 2.0), 1: (12.0, 2.5), 2: (11.0, 2.25)}
BETTER = {0: (8.0, 2.0), 1: (10.5, 2.6), 2: (9.0, 2.2)}


def result(name: str, numbers: dict[int, tuple[float, float]]) -> Result:
    records = {
        f"{name}-{seed}": Record({"fid": fid, "is": score}, {}, {"seed": seed, "count": 300})
        for seed, (fid, score) in numbers.items()
    }
    return combine(name, {}, records)


@pytest.fixture
def comparison() -> Comparison:
    results = compared([result("plain", PLAIN), result("<SAG> & co", BETTER)], None)
    return Comparison(results, METRICS, "mean ± standard deviation over 3 seeds")


def test_text_holds_numbers_changes_and_what_they_rest_on(comparison: Comparison) -> None:
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["setting", "FD", "↓", "IS", "↑"]
    assert lines[1].split() == ["plain", "11.00", "±", "1.00", "2.250", "±", "0.250"]
    assert lines[3:5] == ["300 images", "mean ± standard deviation over 3 seeds"]
    assert lines[7].startswith("<SAG> & co") and lines[7].split()[3:] == [
        *("-1.83", "±", "0.17", "+0.017", "±", "0.044")
    ]
    assert lines[8].startswith("against plain at the same seeds")
    assert repr(comparison) == str(comparison)
    assert not any(line != line.rstrip() for line in lines)


class Cells(html.parser.HTMLParser):
    """The texts of a table's cells, by row, and which of them are bold."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.tags.pop()

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self.tags):
            self.rows[-1][-1] += data
        if "b" in self.tags:
            self.bold.append(data)


def test_a_notebook_shows_a_table(comparison: Comparison) -> None:
    cells = Cells()
    cells.feed(comparison._repr_html_().replace("<br>", " "))
    assert cells.rows == [
        ["setting", "FD ↓", "IS ↑"],
        ["plain", "11.00 ± 1.00", "2.250 ± 0.250"],
        ["<SAG> & co", "9.17 ± 1.26", "2.267 ± 0.306"],
        ["against plain", "-1.83 ± 0.17", "+0.017 ± 0.044"],
    ]
    # What is larger than two standard errors stands out.
    assert cells.bold == ["-1.83 ± 0.17"]
    assert cells.tags == []


def test_rows_and_values_are_plain(comparison: Comparison) -> None:
    plain, better = comparison.rows()
    assert (plain["setting"], plain["fid"], plain["count"]) == ("plain", 11.0, 300)
    assert better["fid_change"] == pytest.approx(-11 / 6)
    assert "fid_change" not in plain
    values = comparison.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["metrics"] == {"fid": "FD", "is": "IS"}
    assert [row["name"] for row in values["results"]] == ["plain", "<SAG> & co"]


def test_results_are_found_by_name(comparison: Comparison) -> None:
    assert comparison["plain"] is comparison.results[0]
    assert [each.name for each in comparison] == ["plain", "<SAG> & co"]
    assert len(comparison) == 2
    with pytest.raises(KeyError, match="'sag': expected the name of a setting, one of 'plain'"):
        comparison["sag"]


def test_what_is_not_measured_or_no_number_is_shown_as_such() -> None:
    results = [Result("a", {}, {"fid": math.nan}, facts={"count": 3}), Result("b", {}, {})]
    text = str(Comparison(results, METRICS))
    assert text.splitlines()[1].split() == ["a", "nan", "–"]
    assert Comparison(results, METRICS).to_dict()["results"][0]["metrics"] == {"fid": None}


@pytest.mark.parametrize("name", ["photos [v1]", "x[/y]", "[bold red]a", r"\[x]", "[link=a]b[/]"])
def test_names_are_no_markup(name: str) -> None:
    results = compared([result(name, PLAIN), result(f"{name} too", BETTER)], None)
    metrics = {"fid": Metric("[FD]", higher=False), "is": Metric("IS[/]", higher=True)}
    text = str(Comparison(results, metrics, f"of {name}"))
    assert text.count(f"{name} too") == 2 and f"\nof {name}\n" in text
    assert f"against {name} at" in text and "[FD] ↓" in text and "IS[/] ↑" in text


def test_several_trainings_are_paired_and_told_apart() -> None:
    models = [small_model(seed) for seed in range(3)]
    found = compare(
        models, {"plain": [], "CFG": [CFG(2.0)]}, seeds=2, num_images=10, steps=2, batch_size=10,
        metrics=["fid"], progress=False,
    )  # fmt: skip
    plain, guided = found
    assert plain.trainings == guided.trainings == 3
    assert plain.facts["model"] == ["small-0", "small-1", "small-2"]
    # One model alone has the same numbers.
    alone = compare(
        models[1], {"plain": []}, seeds=2, num_images=10, steps=2, batch_size=10, metrics=["fid"],
        progress=False,
    )["plain"]  # fmt: skip
    assert plain.runs("fid")[1] == alone.runs("fid")[0]
    told = difference(guided.runs("fid"), plain.runs("fid"))
    assert told is not None and guided.change["fid"] == (told.mean, told.error)
    assert ("fid" in clear_changes(guided)) == told.survives
    text = str(found)
    assert "over 3 trainings of 2 seeds each" in text
    assert "against plain at the same weights and seeds" in text
    parts = found.components("fid")["plain"]
    assert f"FD {parts.training:.3g} and {parts.sampling:.3g}" in text


def test_models_that_are_no_trainings_of_one_are_refused() -> None:
    one = small_model(0)
    with pytest.raises(ValueError, match="same weights"):
        compare([one, one], {"plain": []})
    with pytest.raises(ValueError, match="class_names differ"):
        compare([one, replace(small_model(1), class_names=("a",) * 10)], {"plain": []})
    with pytest.raises(ValueError, match="expected a model"):
        compare([], {"plain": []})
