"""What a study's cells say: changes, fronts, the page, and the tables of docs/study.md."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study_page
from sag_dit.output.folder import write_png
from sag_dit.study.field import Row, Rules
from sag_dit.study.findings import Findings, findings, write_page
from sag_dit.study.measurement import shot
from sag_dit.study.results import write_json
from tests.study.models import cells


@pytest.fixture
def found() -> Findings:
    return findings(cells())[0]


def save(folder: Path, rows: list[Row]) -> Path:
    """A study's folder with these cells, and images of some of them."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    write_json(folder / "rules.json", asdict(Rules()))
    random = np.random.default_rng(0)
    for row in rows:
        write_json(folder / "rows" / row.file, asdict(row))
        if row.identity and row.training == row.seed == 0:
            (folder / "records" / row.identity).mkdir(parents=True, exist_ok=True)
            for place in range(3):
                picture = random.integers(0, 255, (8, 8, 1), dtype=np.uint8)
                write_png(shot(folder / "records" / row.identity, place), picture)
    return folder


def test_rows_come_by_their_fd_with_the_unguided_one_first(found: Findings) -> None:
    assert found.methods == ["unguided", "CFG", "SAG", "history", "PAG"]
    assert found.trainings == [0, 1, 2]
    assert found.missing == {"TPG, training 0": "this UNet has no blocks"}
    assert found.metrics["fid"].title == "FD ↓"


def test_changes_are_paired_and_only_those_of_all_trainings_survive(found: Findings) -> None:
    change = found.change("CFG")
    assert change is not None
    assert change.mean == pytest.approx(-(5 + 5.1 + 4.9) / 3)
    assert change.survives
    worse = found.change("PAG")
    assert worse is not None and not worse.survives
    # Each method was a point worse than CFG of its own effective scale.
    along = found.change("SAG", "along")
    assert along is not None and along.mean == pytest.approx(1)
    assert found.change("CFG", "along") is None
    once = findings(cells(trainings=1))[0].change("CFG")
    assert once is not None and not once.survives


def test_the_best_is_named_for_each_price(found: Findings) -> None:
    assert found.best_at(1) == "history"
    assert found.best_at(2) == "CFG"
    told = found.answers()
    assert len(told) == 2
    assert told[0].startswith("Up to 1 pass a step: history (history 0.5), FD 24.38")
    assert told[1].startswith("Up to 2 passes a step: CFG")


def test_a_pass_of_another_network_is_not_for_nothing(found: Findings) -> None:
    rows = [replace(row, others=20) if row.method == "history" else row for row in found.rows]
    other = Findings(found.family, rows)
    assert other.best_at(1) == "unguided"
    assert other.best_at(2) == "CFG"


def test_both_spreads_are_told(found: Findings) -> None:
    own = found.components("unguided")
    assert own.sampling == pytest.approx(0.1 / 2**0.5)
    # The trainings' deviation is that of 20, 30, 26.
    assert own.training == pytest.approx(5.033, rel=1e-3)


def test_a_row_that_lacks_seeds_is_on_no_front(found: Findings) -> None:
    assert set(found.front("price").rows) == {"history", "CFG"}
    rows = [row for row in found.rows if (row.method, row.training) != ("CFG", 2)]
    partial = Findings(found.family, rows)
    assert "CFG" not in partial.whole()
    assert "CFG" not in partial.front("price").rows
    assert partial.best_at(2) == "SAG"


def test_the_page_answers_first_and_shows_samples(found: Findings, tmp_path: Path) -> None:
    study = save(tmp_path / "study", list(found.rows))
    page = write_page(found, study, tmp_path / "page").read_text("utf-8")
    told = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert told
    data = json.loads(told[1])
    assert data["notes"][0].startswith("Up to 1 pass a step: history")
    assert [row["name"] for row in data["rows"]] == found.methods
    assert all(len(row["images"]) == 3 for row in data["rows"])
    assert "against unguided, survives retraining" in " ".join(data["rows"][1]["notes"])
    assert [chart["title"] for chart in data["charts"]] == ["FD against price", "FD against recall"]


def test_docs_are_filled_between_their_marks(tmp_path: Path) -> None:
    lone = [replace(row, family="one training") for row in cells(trainings=1, seeds=1)]
    study = save(tmp_path / "study", [*cells(), *lone])
    page = tmp_path / "study.md"
    template = study_page.PAGE.read_text("utf-8")
    page.write_text(template, "utf-8")
    (tmp_path / "images").mkdir()
    study_page.write(study, page, tmp_path / "images")
    text = page.read_text("utf-8")
    # The text by hand stays, and every block is filled.
    blocks = study_page.BLOCK
    assert blocks.sub("", text) == blocks.sub("", template)
    assert "Not measured yet" not in text
    assert "| CFG | CFG 0.5 | 20 | 40 |" in text
    assert "**-5.00 ± 0.06**\\*" in text
    assert "- against unguided: lower FD: CFG" in text
    assert "One training: what would survive another one cannot be told." in text
    assert "this UNet has no blocks" in text
    assert "1 of 2 sampling seeds" in text
    for name in re.findall(r"\]\(images/(.*?)\)", text):
        assert (tmp_path / "images" / name).read_bytes()[:4] == b"\x89PNG"
    # Once more, from what it has become, it comes out the same.
    study_page.write(study, page, tmp_path / "images")
    assert page.read_text("utf-8") == text
