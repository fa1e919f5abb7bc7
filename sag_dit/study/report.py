"""What a comparison leaves behind: JSON, CSV, a page with curves, and a logger's summary."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sag_dit.files import atomic
from sag_dit.output.folder import read_png
from sag_dit.output.gallery import data_uri, flatten
from sag_dit.study.charts import Chart, charts, places, write_plots
from sag_dit.study.comparison import Comparison, changes
from sag_dit.study.measurement import shot
from sag_dit.study.results import Metric, Result, flat_facts, write_json


def report(
    comparison: Comparison,
    out: Path,
    finished: Path,
    *,
    num: int,
    plots: bool,
    before: Sequence[Chart] = (),
) -> Path:
    """Write everything into ``out``, and return the page.

    The page shows the first ``num`` images of each setting that were kept in ``finished``; with
    ``plots`` its curves are PNG files as well. The charts ``before`` come first.
    """
    results, metrics, about = comparison.results, comparison.metrics, comparison.about
    write_results(out, comparison)
    drawn = [*before, *(charts(results, metrics) if len(results) > 1 else [])]
    caption = comparison.caption
    if plots:
        for file in write_plots(out, drawn, f"{caption}; {about}" if about else caption):
            print(f"curves: {file}")
    return _write_page(
        out, comparison, drawn, [_shots(finished, result, num) for result in results]
    )


def write_results(folder: Path, comparison: Comparison) -> tuple[Path, Path]:
    """Write ``results.json`` and ``results.csv``: every number with its facts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / "results.json", folder / "results.csv"
    write_json(as_json, comparison.to_dict())
    flat = comparison.rows()
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with atomic(as_csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(flat)
    return as_json, as_csv


def _shots(finished: Path, result: Result, num: int) -> list[NDArray[np.uint8]]:
    folder = finished / result.identities[0]
    files = [shot(folder, index) for index in range(num)]
    return [read_png(file) for file in files if file.exists()]


def _write_page(
    out: Path,
    comparison: Comparison,
    drawn: Sequence[Chart],
    images: Sequence[Sequence[NDArray[np.uint8]]],
) -> Path:
    results, metrics = comparison.results, comparison.metrics
    caption, about = comparison.caption, comparison.about
    facts = results[0].facts
    what = str(facts.get("model") or facts.get("samples"))
    count = f"{len(results)} settings" if len(results) > 1 else results[0].name
    same = "Every setting starts from the same noise. " if "model" in facts else ""
    # The protocol: facts that all results share.
    shared = {
        key: value
        for key, value in flat_facts(facts)
        if all(dict(flat_facts(each.facts)).get(key) == value for each in results)
    }
    # What makes numbers less comparable, each said once though several results say it.
    notes = [text for result in results for text in result.warnings]
    for result in results:
        if result.expected is not None:
            notes += _expected_notes(result, metrics)
    return write_curves(
        out,
        results,
        metrics,
        drawn,
        images=images,
        remarks=[_remarks(result, metrics) for result in results],
        title=f"{what}: {count}",
        lead=f"{same}{caption[:1].upper()}{caption[1:]}.",
        spread=f"{about[:1].upper()}{about[1:]}." if about else "",
        notes=list(dict.fromkeys(notes)),
        settings=shared,
    )


def _remarks(result: Result, metrics: Mapping[str, Metric]) -> list[str]:
    texts = changes(result, metrics)
    told = ", ".join(f"{metrics[name].label} {text}" for name, text in texts.items())
    return [f"against {result.against}: {told}"] if told else []


def _expected_notes(result: Result, metrics: Mapping[str, Metric]) -> list[str]:
    expected = result.expected
    if expected is None:
        return []
    numbers = [
        f"{metrics[name].label} {published:g} (here {difference:+.4g})"
        for name, (published, _, difference) in expected.differences(result.metrics).items()
    ]
    told = "; ".join(result.deviations)
    rest = f"; the protocols differ, or may differ, in {told}" if told else ""
    return [f"{result.name}: {expected.source} has {', '.join(numbers)}{rest}."]


def log(logger: Any, results: Sequence[Result]) -> None:
    """Give the numbers to a logger: as Weights & Biases' summary, else as metrics."""
    from lightning.pytorch.loggers import WandbLogger

    numbers = {
        f"{result.name}/{name}" if len(results) > 1 else name: value
        for result in results
        for name, value in result.metrics.items()
    }
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.summary.update(numbers)
        names = list(results[0].metrics)
        columns: list[str | int] = ["setting", *names, *(f"{name}_spread" for name in names)]
        data = [
            [
                result.name,
                *(result.metrics.get(name) for name in names),
                *(result.spread.get(name) for name in names),
            ]
            for result in results
        ]
        logger.experiment.log({"results": wandb.Table(columns=columns, data=data)})
        logger.experiment.config.update({"results": [dict(r.facts) for r in results]})
    else:
        logger.log_metrics(numbers)
    logger.finalize("success")


TINY = 128
"""Images whose longer side is shorter are shown with hard pixels."""


def write_curves(
    folder: Path,
    results: Sequence[Result],
    metrics: Mapping[str, Metric],
    charts: Sequence[Chart],
    *,
    images: Sequence[Sequence[NDArray[np.uint8]]],
    remarks: Sequence[Sequence[str]],
    title: str,
    lead: str,
    spread: str,
    notes: Sequence[str],
    settings: Mapping[str, object],
) -> Path:
    """Write ``index.html``, one file that needs no network, and return its path.

    Beside each result stand its first ``images``, (H, W, 1 or 3), and ``remarks``. ``spread`` says
    what stands behind ±; ``notes`` are warnings; ``settings`` is the protocol.
    """
    data = {
        "lead": lead,
        "spread": spread,
        "notes": list(notes),
        "settings": list(flatten(settings)),
        "metrics": {
            name: {**asdict(metric), "title": metric.title, "places": places(results, name)}
            for name, metric in metrics.items()
        },
        "rows": [_row(*each) for each in zip(results, images, remarks, strict=True)],
        "charts": [asdict(chart) for chart in charts],
    }
    # Inside a script element only "<" can end it; as an escape it means the same to JSON.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    fields = {"data": embedded, "title": html.escape(title)}
    template = resources.files("sag_dit.study").joinpath("curves.html").read_text("utf-8")
    page = re.sub(r"\{\{(data|title)\}\}", lambda match: fields[match[1]], template)
    file = folder / "index.html"
    with atomic(file) as temporary:
        temporary.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return file


def _row(
    row: Result, images: Sequence[NDArray[np.uint8]], remarks: Sequence[str]
) -> dict[str, Any]:
    return {
        "name": row.name,
        "metrics": {name: _finite(value) for name, value in row.metrics.items()},
        "spread": {name: _finite(value) for name, value in row.spread.items()},
        "images": [data_uri(image) for image in images],
        "tiny": all(max(image.shape[:2]) < TINY for image in images),
        "notes": list(remarks),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
