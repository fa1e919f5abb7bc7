"""The page of an evaluation in a real browser, opened from disk without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sag_dit.study.charts import charts
from sag_dit.study.report import write_curves
from sag_dit.study.results import Metric, Result

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
METRICS = {"fid": Metric("FID", higher=False), "is": Metric("IS", higher=True)}


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 360)])
def test_the_page(browser: playwright.Browser, tmp_path: Path, scheme: str, width: int) -> None:
    random = np.random.default_rng(0)
    rows = [
        Result(
            f"SAG {scale:g}",
            {"sag_scale": scale},
            {"fid": 5 - scale, "is": 2 + scale**2},
            {"fid": 0.1},
        )
        for scale in (0.0, 0.5, 1.0, 2.0)
    ]
    images = [[random.integers(0, 256, (8, 8, 1), dtype=np.uint8) for _ in range(3)] for _ in rows]
    page_file = write_curves(
        tmp_path, rows, METRICS, charts(rows, METRICS), title="<b>t</b>", lead="l", spread="s",
        notes=["n"], settings={"k": "v" * 300}, images=images, remarks=[[]] * len(rows),
    )  # fmt: skip
    context = browser.new_context(
        offline=True, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_file.as_uri())

    assert page.title() == "<b>t</b>"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("tbody tr").count() == 4
    # The lowest FID and the highest IS, both of the last setting.
    assert page.locator("td.best").all_inner_texts() == ["3.000 ± 0.100", "6.000"]
    assert page.locator(".chart").count() == 3
    assert page.locator(".chart .dot").count() == 3 * 4
    assert page.locator(".set img").count() == 4 * 3
    # A point tells which setting it is, and shows its samples.
    dot = page.locator(".chart").nth(1).locator(".dot").nth(2)
    dot.focus()
    assert "SAG 1" in page.locator("#tip").inner_text()
    assert page.locator("#tip img").count() == 3
    assert page.locator("tbody tr.lit th").inner_text() == "SAG 1"
    dot.blur()
    assert page.locator("#tip").is_hidden()
    # Along the scale, points stand at even distances where the scale is even.
    places = [
        page.locator(".chart").nth(1).locator(".dot").nth(k).bounding_box()["x"] for k in range(4)
    ]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=1)
    assert places[3] - places[2] == pytest.approx(2 * (places[1] - places[0]), abs=1)
    assert complaints == []
    context.close()


@pytest.mark.parametrize(
    ("values", "errors", "bold"),
    [
        ((3.0, 3.5, 5.0), (0.2, 0.2, 0.2), ["A"]),
        ((3.0, 3.5, 5.0), (0.4, 0.2, 0.2), []),
        ((3.0, 3.5, 5.0), (0.2, 0.4, 0.2), []),
        ((3.0, 3.5, 3.0), (None, None, None), []),
        ((3.0, 3.5, 3.1), (None, None, None), ["A"]),
        ((3.0, None, 5.0), (0.9, None, 0.9), ["A"]),
    ],
)
def test_what_lies_within_errors_is_not_bold(
    browser: playwright.Browser,
    tmp_path: Path,
    values: tuple[float | None, ...],
    errors: tuple[float | None, ...],
    bold: list[str],
) -> None:
    # The second metric is the mirror image of the first, so that more of it is better.
    rows = [
        Result(
            name,
            {},
            {} if value is None else {"fid": value, "is": 10 - value},
            {} if error is None else {"fid": error, "is": error},
        )
        for name, value, error in zip("ABC", values, errors, strict=True)
    ]
    file = write_curves(
        tmp_path, rows, METRICS, [], title="t", lead="l", spread="± s.", notes=[], settings={},
        images=[[]] * 3, remarks=[[]] * 3,
    )  # fmt: skip
    page = browser.new_page()
    page.goto(file.as_uri())
    found = page.locator("tr:has(td.best) th").all_inner_texts()
    assert found == bold and page.locator("td.best").count() == 2 * len(bold)
    assert page.locator("#spread").inner_text().startswith("± s. Bold is better than all others")
    page.close()
