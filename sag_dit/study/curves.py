"""The page of an evaluation: numbers, curves, and samples of every setting, in one file."""

from __future__ import annotations

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
from sag_dit.output.gallery import data_uri, flatten
from sag_dit.study.charts import Chart, places
from sag_dit.study.results import Metric, Result

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
