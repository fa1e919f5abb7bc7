"""Charts of settings, and the page that shows them beside samples."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sag_dit.study.charts import charts, numeric_axes, places
from sag_dit.study.report import write_curves
from sag_dit.study.results import Metric, Result

METRICS = {
    "fid": Metric("FID", higher=False),
    "is": Metric("IS", higher=True),
    "precision": Metric("precision", higher=True),
    "recall": Metric("recall", higher=True),
}
AWKWARD = "</script><script>alert('x')</script> {{data}} é"


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 1), dtype=np.uint8)


def sweep() -> list[Result]:
    rows = []
    for cfg in (1, 1.5):
        for sag in (1.0, 0.0, 0.5):  # not in order
            values = {"fid": 3 + sag - cfg, "is": 100 + sag, "precision": 0.5, "recall": cfg / 3}
            axes = {"cfg_scale": cfg, "sag_scale": sag, "sampler": "ddim"}
            name = f"{cfg} {sag} {AWKWARD}"
            rows.append(Result(name, axes, values, {"fid": 0.25}))
    return rows


def write(folder: Path, rows: list[Result]) -> str:
    drawn = charts(rows, METRICS) if len(rows) > 1 else []
    page = write_curves(
        folder, rows, METRICS, drawn, title=AWKWARD, lead="lead", spread="±", notes=[AWKWARD],
        images=[[image(place), image(50 + place)] for place in range(len(rows))],
        remarks=[[]] * len(rows), settings={"a": {"b": 1}},
    )  # fmt: skip
    return page.read_text(encoding="utf-8")


def read(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_lines_run_along_one_axis_in_its_order() -> None:
    rows = sweep()
    assert numeric_axes(rows) == ["cfg_scale", "sag_scale"]
    drawn = charts(rows, METRICS)
    names = [(chart.name, chart.title) for chart in drawn]
    assert names[:3] == [
        ("trade_off", "FID against IS"),
        ("trade_off", "precision against recall"),
        ("cfg_scale", "FID ↓"),
    ]
    assert len(drawn) == 2 + 2 * 4
    along_sag = next(chart for chart in drawn if chart.name == "sag_scale")
    assert [series.label for series in along_sag.series] == [
        "CFG 1, sampler ddim",
        "CFG 1.5, sampler ddim",
    ]
    first = along_sag.series[0].points
    assert [(point.x, point.y, point.row) for point in first] == [
        (0, 2, 1),
        (0.5, 2.5, 2),
        (1, 3, 0),
    ]
    assert [(point.dx, point.dy) for point in first] == [(0, 0.25)] * 3
    # The trade-off runs along the longer axis, and says where on it a point is.
    points = drawn[0].series[1].points
    assert [(point.text, point.x, point.y) for point in points] == [
        ("0", 100, 1.5),
        ("0.5", 100.5, 2.0),
        ("1", 101, 2.5),
    ]


def test_named_settings_are_points_of_their_own() -> None:
    rows = [Result(name, {}, row.metrics) for name, row in zip("ab", sweep(), strict=False)]
    drawn = charts(rows, METRICS)
    assert [chart.name for chart in drawn] == ["trade_off", "trade_off"]
    assert [(series.label, len(series.points)) for series in drawn[0].series] == [
        ("a", 1),
        ("b", 1),
    ]


def test_a_number_that_is_not_finite_is_no_point() -> None:
    rows = sweep()
    rows[1] = Result(rows[1].name, rows[1].axes, {**rows[1].metrics, "fid": math.nan})
    drawn = charts(rows, METRICS)
    assert sum(len(series.points) for series in drawn[0].series) == 5


@pytest.mark.parametrize(
    ("value", "decimals"), [(278.24, 1), (12.0, 2), (2.27, 3), (0.67, 4), (0.0, 6)]
)
def test_places(value: float, decimals: int) -> None:
    assert (
        places([Result("a", {}, {"fid": value}), Result("b", {}, {"fid": 0.0})], "fid") == decimals
    )


def test_the_page_holds_numbers_charts_and_samples(tmp_path: Path) -> None:
    rows = sweep()
    rows[2] = Result("broken", rows[2].axes, {**rows[2].metrics, "fid": math.nan})
    page = write(tmp_path, rows)
    data = read(page)
    assert data["rows"][0]["name"] == rows[0].name
    assert data["rows"][0]["metrics"] == rows[0].metrics
    assert data["rows"][2]["metrics"]["fid"] is None
    assert data["charts"][0]["title"] == "FID against IS"
    assert data["settings"] == [["a.b", "1"]]
    head, content = data["rows"][0]["images"][1].split(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    np.testing.assert_array_equal(shown, image(50)[..., 0])
    # Nothing of the data ends the script or stands as markup, and nothing is fetched.
    assert page.count("</script>") == 2
    assert "<title>&lt;/script&gt;" in page
    assert not re.search(r"(src|href)=\"https?:", page)


def test_plots_are_pictures_with_labelled_axes(tmp_path: Path) -> None:
    from sag_dit.study import charts as plots

    rows = sweep()
    group = [chart for chart in charts(rows, METRICS) if chart.name == "trade_off"]
    (file,) = plots.write_plots(tmp_path, group, "500 images")
    with Image.open(file) as opened:
        picture = np.asarray(opened.convert("RGB"))
    assert picture.shape[1] > 1000
    assert (picture[0, 0] == 255).all()
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)[::7].tolist()}
    for name in plots.COLOURS[:2]:  # a line for each of the two series
        wanted = tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))
        assert wanted in colours
    assert tuple(int(plots.COLOURS[2][i : i + 2], 16) for i in (1, 3, 5)) not in colours
