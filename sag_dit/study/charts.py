"""Charts of measured settings: FID against IS, precision against recall, metrics against scales.

A chart is data alone; the page and the PNG files draw the same ones.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.files import atomic
from sag_dit.methods import methods
from sag_dit.study.results import Metric, Result, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRADE_OFFS = (("is", "fid"), ("recall", "precision"))
"""Pairs of metrics of which guidance usually gains one at the other's cost: (x, y)."""


NO_ROW = -1
"""The row of a point that is none of the table."""


@dataclass(frozen=True)
class Point:
    """A setting in a chart: its row, its place, the half-lengths of its error bars, its text.

    Example:
        >>> Point(row=0, x=0.5, y=12.0, dx=0.0, dy=0.3, text="0.5").y
        12.0
    """

    row: int
    x: float
    y: float
    dx: float
    dy: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line in their order; ``place`` chooses the colour.

    Example:
        >>> points = (Point(0, 0.0, 14.0, 0.0, 0.3, ""), Point(1, 0.5, 12.0, 0.0, 0.3, ""))
        >>> Series("SAG", place=0, points=points).label
        'SAG'
    """

    label: str
    place: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """One pair of axes. ``name`` groups charts that belong into one picture.

    ``texts`` says what the texts at the points are; they are shown where it is not empty.

    Example::

        for chart in charts(results, metrics):
            print(chart.title, [series.label for series in chart.series])
    """

    name: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    texts: str = ""


@cache
def axis_titles() -> dict[str, str]:
    """Return what the keys of common sweeps are called in full; others are called by their key."""
    scales = {f"{m.key}_scale": f"{m.title} scale ({m.neutral:g} is off)" for m in methods()}
    return scales | {"steps": "denoiser steps", "num_images": "number of images"}


@cache
def short_names() -> dict[str, str]:
    """Return how a legend calls the keys of scales."""
    return {f"{m.key}_scale": m.title.removesuffix(" guidance") for m in methods()}


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
            texts = "" if longest is None else axis_titles().get(longest, longest)
            made.append(
                Chart("trade_off", title, metrics[x].title, metrics[y].title, series, texts)
            )
    for axis in axes:
        for name, metric in metrics.items():
            series = _series(rows, axis, None, name)
            made.append(
                Chart(axis, metric.title, axis_titles().get(axis, axis), metric.title, series)
            )
    return [chart for chart in made if chart.series]


def _series(rows: Sequence[Result], along: str | None, x: str | None, y: str) -> tuple[Series, ...]:
    groups: dict[str, list[Point]] = {}
    # Rows that differ along this axis alone are one line, called after the others' values.
    for number, row in enumerate(rows):
        if along is None:
            label = row.name
        else:
            label = ", ".join(
                f"{short_names().get(key, key)} {text_of(value)}"
                for key, value in row.axes.items()
                if key != along
            )
        place = groups.setdefault(label, [])
        # A row that lacks a finite number is no point.
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

    # Lines run from the smallest value of the axis to the largest.
    def order(point: Point) -> float:
        value = rows[point.row].axes[along] if along is not None else 0
        return float(value) if isinstance(value, (int, float)) else 0.0

    return tuple(
        Series(label, place, tuple(sorted(points, key=order)))
        for place, (label, points) in enumerate(groups.items())
        if points
    )


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a2437d", "#56a4d9", "#8a6d00", "#33333a")
"""Told apart with every kind of colour vision, and on white; after Okabe and Ito."""
MARKERS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
"""Past seven series the colours come again, with other markers and lines."""
_INK, _SOFT, _LINE = "#1a1a1e", "#55555e", "#e0e0dc"


def write_plots(folder: Path, charts: Sequence[Chart], caption: str) -> list[Path]:
    """Write a PNG per group of charts, and return their paths."""
    import matplotlib

    files = []
    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": _SOFT,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": _LINE,
        "xtick.color": _SOFT,
        "ytick.color": _SOFT,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    for name in dict.fromkeys(chart.name for chart in charts):
        group = [chart for chart in charts if chart.name == name]
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
        file = folder / f"{safe}.png"
        with matplotlib.rc_context(style), atomic(file) as temporary:
            temporary.write_bytes(_figure(group, caption))
        files.append(file)
    return files


def _figure(group: Sequence[Chart], caption: str) -> bytes:
    # Not pyplot: it would look for a screen and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(group))
    rows = math.ceil(len(group) / columns)
    figure = Figure(figsize=(3.9 * columns + 0.4, 3.1 * rows + 0.9), dpi=160)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    cells = list(grid.flat)
    for chart, axes in zip(group, cells, strict=False):
        _draw(axes, chart)
    for axes in cells[len(group) :]:
        axes.set_axis_off()
    width, height = figure.get_size_inches()
    # Below the charts stand the caption and above it the legend, in inches.
    lines = textwrap.wrap(caption, int(width / 0.058))
    bottom = 0.1 + 0.13 * len(lines)
    figure.text(
        0.012, 0.05 / height, "\n".join(lines), fontsize=7, color=_SOFT, va="bottom"
    )  # fmt: skip
    handles, labels = cells[0].get_legend_handles_labels()
    if labels:
        texts = f"at the points: {group[0].texts}" if group[0].texts else None
        wide = max(1, min(len(labels), int(width / (0.6 + 0.085 * max(map(len, labels))))))
        figure.legend(
            handles, labels, title=texts, title_fontsize=8, loc="lower center", ncols=wide,
            frameon=False, bbox_to_anchor=(0.5, bottom / height),
        )  # fmt: skip
        bottom += 0.25 + 0.2 * (math.ceil(len(labels) / wide) + bool(texts))
    figure.tight_layout(rect=(0, bottom / height, 1, 1), w_pad=1.6, h_pad=1.4)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        _line(axes, series, texts=bool(chart.texts))
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.margins(0.09, 0.12)
    axes.set_axisbelow(True)
    if chart.name in axis_titles():
        ticks = sorted({point.x for series in chart.series for point in series.points})
        if len(ticks) <= 7:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _line(axes: Axes, series: Series, texts: bool) -> None:
    from matplotlib.patheffects import withStroke

    shade = COLOURS[series.place % len(COLOURS)]
    dash = DASHES[series.place // len(COLOURS) % len(DASHES)]
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    axes.errorbar(
        x, y,
        xerr=[p.dx for p in series.points] if any(p.dx for p in series.points) else None,
        yerr=[p.dy for p in series.points] if any(p.dy for p in series.points) else None,
        color=shade, marker=MARKERS[series.place % len(MARKERS)], markersize=5, linewidth=1.6,
        linestyle=dash, elinewidth=0.9, capsize=2, label=series.label, markeredgecolor="white",
        markeredgewidth=0.6,
    )  # fmt: skip
    if texts:
        for point in series.points:
            axes.annotate(
                point.text, (point.x, point.y), xytext=(4, 5), textcoords="offset points",
                fontsize=7, color=shade, path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
