"""Charts of measured settings: FID against IS, precision against recall, metrics against scales.

A chart is data alone; the page and the PNG files draw the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sag_dit.study.results import Metric, Result, Value

AXES = {
    "sag_scale": "SAG scale (0 is off)",
    "cfg_scale": "CFG scale (1 is off)",
    "blur_scale": "blur guidance scale (0 is off)",
    "steps": "denoiser steps",
    "num_images": "number of images",
}
"""What the keys of common sweeps are called in full; others are called by their key."""

SHORT = {"sag_scale": "SAG", "cfg_scale": "CFG", "blur_scale": "blur"}
"""How a legend calls the keys of scales."""

TRADE_OFFS = (("is", "fid"), ("recall", "precision"))
"""Pairs of metrics of which guidance usually gains one at the other's cost: (x, y)."""


@dataclass(frozen=True)
class Point:
    """A setting in a chart: its row, its place, the half-lengths of its error bars, its text."""

    row: int
    x: float
    y: float
    dx: float
    dy: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line in their order; ``place`` chooses the colour."""

    label: str
    place: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """One pair of axes. ``name`` groups charts that belong into one picture.

    ``texts`` says what the texts at the points are; they are shown where it is not empty.
    """

    name: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    texts: str = ""


def is_number(value: Value) -> bool:
    """Whether a value can be a place on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numeric_axes(rows: Sequence[Result]) -> list[str]:
    """Return the axes along which every row has a number, and not all the same one."""
    keys = rows[0].axes if rows else ()
    return [
        key
        for key in keys
        if all(is_number(row.axes.get(key)) for row in rows)
        and len({row.axes[key] for row in rows}) > 1
    ]


def text_of(value: Value) -> str:
    """Write a value as it is typed."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def places(rows: Sequence[Result], name: str) -> int:
    """Return how many decimals the values of a metric are written with, the same for all."""
    sizes = (
        abs(row.metrics[name]) for row in rows if math.isfinite(row.metrics.get(name, math.nan))
    )
    size = max(sizes, default=0.0)
    return next((n for n, least in enumerate((100, 10, 1, 0.01), start=1) if size >= least), 6)


def charts(rows: Sequence[Result], metrics: Mapping[str, Metric]) -> list[Chart]:
    """Return the trade-offs, then every metric along every numeric axis.

    A line runs along one axis; settings that differ in others are lines of their own. The
    trade-offs run along the axis with the most values. Without a numeric axis every setting is a
    point of its own.
    """
    axes = numeric_axes(rows)
    longest = max(axes, key=lambda key: len({row.axes[key] for row in rows}), default=None)
    made = []
    for x, y in TRADE_OFFS:
        if x in metrics and y in metrics:
            title = f"{metrics[y].label} against {metrics[x].label}"
            series = _series(rows, longest, x, y)
            texts = "" if longest is None else AXES.get(longest, longest)
            made.append(
                Chart("trade_off", title, metrics[x].title, metrics[y].title, series, texts)
            )
    for axis in axes:
        for name, metric in metrics.items():
            series = _series(rows, axis, None, name)
            made.append(Chart(axis, metric.title, AXES.get(axis, axis), metric.title, series))
    return [chart for chart in made if chart.series]


def _series(rows: Sequence[Result], along: str | None, x: str | None, y: str) -> tuple[Series, ...]:
    groups: dict[str, list[Point]] = {}
    for number, row in enumerate(rows):
        if along is None:
            label = row.name
        else:
            label = ", ".join(
                f"{SHORT.get(key, key)} {text_of(value)}"
                for key, value in row.axes.items()
                if key != along
            )
        place = groups.setdefault(label, [])
        across = row.metrics.get(x) if x is not None else row.axes[along or ""]
        height = row.metrics.get(y)
        if not isinstance(across, (int, float)) or height is None:
            continue
        if not (math.isfinite(across) and math.isfinite(height)):
            continue
        place.append(
            Point(
                number,
                float(across),
                float(height),
                row.spread.get(x, 0.0) if x is not None else 0.0,
                row.spread.get(y, 0.0),
                row.name if along is None else text_of(row.axes[along]),
            )
        )

    def order(point: Point) -> float:
        value = rows[point.row].axes[along] if along is not None else 0
        return float(value) if isinstance(value, (int, float)) else 0.0

    return tuple(
        Series(label, place, tuple(sorted(points, key=order)))
        for place, (label, points) in enumerate(groups.items())
        if points
    )
