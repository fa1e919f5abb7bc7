"""The charts of a sweep as PNG files, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.files import atomic
from sag_dit.study.charts import AXES, Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
            temporary.write_bytes(_picture(group, caption))
        files.append(file)
    return files


def _picture(group: Sequence[Chart], caption: str) -> bytes:
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
    if chart.name in AXES:
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
