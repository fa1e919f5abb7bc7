"""Write docs/study.md's tables and figures: ``python -m benchmarks.study_page``.

They follow from the cells that ``python -m benchmarks.study`` has written, finished or not; what is
missing is told. The text around them is written by hand, and beside each figure stand its cells. A
page of each family with samples, in ``OUT/pages``, answers which method is best at which price.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from sag_dit.files import atomic
from sag_dit.study.charts import COLOURS
from sag_dit.study.field import Row, Rules, read_rows
from sag_dit.study.findings import UNGUIDED, Findings, findings, write_page
from sag_dit.study.variance import Difference, overall
from sag_dit.untrusted import read_json_as

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "study.md"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
AGAINST = {
    "unguided": "unguided",
    "along": "CFG of the same w, equal steps",
    "passes": "CFG of the same w, equal passes",
    "size": "CFG of the same size",
}
"""How the columns of changes are called."""
FAR = 2.5
"""Rows of so many times the unguided FD lie beyond the figures' axes."""
SHORT = {"unguided": "to unguided", "along": "to CFG of the same w"}
"""The changes that figures show."""


def number(mean: float | None, error: float | None = None, places: int = 2) -> str:
    """Return a number with its error as a table shows it; a dash where there is none."""
    if mean is None or not math.isfinite(mean):
        return "–"
    text = f"{mean:.{places}f}"
    return f"{text} ± {error:.{places}f}" if error is not None and math.isfinite(error) else text


def change(found: Difference | None, allowed: float | None) -> str:
    """Return a change: in bold where it survives retraining, with a star where Holm allows it."""
    if found is None:
        return "–"
    text = f"{found.mean:+.2f}"
    text += f" ± {found.error:.2f}" if math.isfinite(found.error) else ""
    star = "\\*" if allowed is not None and allowed < 0.05 else ""
    return f"**{text}**{star}" if found.survives else text


def table(found: Findings) -> str:
    """Return a family's table: settings, prices, numbers and changes of FD."""
    others = [name for name in found.metrics if name in ("is", "precision", "recall")]
    titles = ["method", "setting", "steps", "passes", "FD"]
    titles += [found.metrics[name].label for name in others]
    titles += ["w (share)", *(f"FD against {each}" for each in AGAINST.values())]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in found.table():
        passes = f"{row['passes']:.3g}" + f" + {row['others']}" * bool(row["others"])
        cells = [row["method"], row["guidance"], f"{row['steps']}", passes]
        cells += [number(row["fid"], row["fid_error"])]
        cells += [number(row.get(name), row.get(f"{name}_error"), 3) for name in others]
        along = number(row["along"])
        cells += [f"{along} ({row['share']:.2f})" if row["share"] is not None else along]
        for against in AGAINST:
            cells.append(change(row.get(f"against_{against}"), row.get(f"holm_{against}")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(found: Findings) -> str:
    """Return what a family's table rests on."""
    first = found.cells(UNGUIDED)[0]
    seeds = sorted({row.seed for row in found.cells(UNGUIDED)})
    names = found.methods[1:]
    partial = [name for name in names if name not in found.whole()]
    text = (
        f"{first.images} images a cell, {first.sampler}; training seeds "
        f"{', '.join(map(str, found.trainings))}; sampling seeds {', '.join(map(str, seeds))}. "
    )
    if len(found.trainings) == 1:
        text += "One training: what would survive another one cannot be told. "
    if partial:
        text += f"Not yet at all seeds: {', '.join(partial)}. "
    return text.strip()


def answers(all_of: Sequence[Findings]) -> str:
    """Return which method is best at which price, family by family."""
    lines = []
    for found in all_of:
        lines += [f"{found.family}:", "", *(f"- {each}" for each in found.answers()), ""]
    return "\n".join(lines)


def tables(all_of: Sequence[Findings]) -> str:
    """Return the tables of all families, each with its figure."""
    parts = []
    for found in all_of:
        picture = f"images/{file_of(found)}"
        parts += [f"### {found.family}", "", table(found), "", caption(found), ""]
        parts += [f"![{found.family}: FD against price and recall, and changes]({picture})", ""]
    return "\n".join(parts)


def spread(all_of: Sequence[Findings]) -> str:
    """Return the variance components of each family and metric."""
    lines = [
        "| models | metric | unguided | over trainings | over samplings | of all rows, median: "
        "over trainings | over samplings |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in all_of:
        for name, metric in found.metrics.items():
            runs = found.runs(UNGUIDED, name)
            if not runs:
                continue
            own, typical = found.components(UNGUIDED, name), found.typical(name)
            sizes = (overall(runs)[0], own.training, own.sampling)
            sizes += (typical.training, typical.sampling)  # type: ignore[assignment]
            cells = [number(size, places=3) for size in sizes]
            lines.append(f"| {found.family} | {metric.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fronts(all_of: Sequence[Findings]) -> str:
    """Return the Pareto fronts of each family, with how often each row is on them."""
    lines = [
        "| models | front of FD and | rows, and how often they are on it | hypervolume "
        "| of unguided and CFG alone |",
        "|---|---|---|---|---|",
    ]
    for found in all_of:
        for second, title in (("price", "passes"), ("recall", "recall")):
            if not found.whole() or (second != "price" and second not in found.metrics):
                continue
            front = found.front(second)
            often = sorted(front.chance.items(), key=lambda each: -each[1])
            told = [f"{name} {chance:.0%}" for name, chance in often if chance >= 0.05]
            # The area of the plainest rows, to the same corner.
            plain = [name for name in (UNGUIDED, "CFG") if name in found.whole()]
            alone = found.front(second, plain, front.corner)
            cells = [found.family, title, ", ".join(told)]
            cells += [number(each.volume, each.error) for each in (front, alone)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdicts(all_of: Sequence[Findings]) -> str:
    """Return what helps, what harms, and what cannot be told, against each base."""
    lines = []
    for found in all_of:
        if len(found.trainings) == 1:
            lines += [f"{found.family}: one training, of which nothing can be told.", ""]
            continue
        lines += [f"{found.family}:", ""]
        for against, title in AGAINST.items():
            changes = {name: found.change(name, against) for name in found.methods[1:]}
            known = {name: each for name, each in changes.items() if each is not None}
            if not known:
                continue
            told = []
            for word, holds in (
                ("lower FD", lambda each: each.survives and each.mean < 0),
                ("higher FD", lambda each: each.survives and each.mean > 0),
                ("cannot be told", lambda each: not each.survives),
            ):
                names = [name for name, each in known.items() if holds(each)]
                told.append(f"{word}: {', '.join(names) or 'none'}")
            lines.append(f"- against {title}: {'; '.join(told)}.")
        lines.append("")
    return "\n".join(lines)


def lacking(all_of: Sequence[Findings], rows: Sequence[Row], rules: Rules) -> str:
    """Return what has no number, and why."""
    lines = []
    for found in all_of:
        # The same of every training is told once.
        reasons = {(name.partition(", training ")[0], why) for name, why in found.missing.items()}
        lines += [f"- {found.family}, {name}: {why}" for name, why in sorted(reasons)]
        partial = [name for name in found.methods if name not in found.whole()]
        if partial:
            lines.append(f"- {found.family}: not yet at all seeds: {', '.join(partial)}")
        seeds = {row.seed for row in found.cells(UNGUIDED)}
        if len(seeds) < rules.seeds:
            lines.append(f"- {found.family}: {len(seeds)} of {rules.seeds} sampling seeds")
    started = {row.family for row in rows} - {found.family for found in all_of}
    lines += [f"- {family}: begun, and nothing measured" for family in sorted(started)]
    return "\n".join(lines or ["Nothing that was planned."]) + "\n"


def protocol(rules: Rules) -> str:
    """Return the rules of the study, as they were before anything was drawn."""
    words = {
        "steps": "steps of the model's own sampler",
        "images": "images of each cell, against the split `report`",
        "seeds": "sampling seeds of each training",
        "scales": "scales tried of each method",
        "tuning": "images that each of them is tried on, against the split `tune`",
        "effects": "images that effects are measured on",
        "batch_size": "images drawn at once",
    }
    lines = ["| number | of what |", "|---|---|"]
    lines += [f"| {value} | {words[name]} |" for name, value in asdict(rules).items()]
    return "\n".join(lines) + "\n"


def cells(rows: Sequence[Row]) -> str:
    """Return cells as JSON, one in a line, without what says nothing."""
    lines = [
        json.dumps(
            {key: value for key, value in asdict(row).items() if value not in ("", {}, None)}
        )
        for row in rows
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def file_of(found: Findings) -> str:
    """Return the name of a family's figure."""
    return f"study_{re.sub(r'[^a-z0-9]+', '_', found.family.lower())}.png"


def draw(found: Findings, file: Path) -> None:
    """Draw FD against price and recall with their fronts, and what each method changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = found.methods
    height = max(4.0, 0.24 * len(names) + 1.4)
    figure = Figure(figsize=(15, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    # Both fronts: what nothing is better than, joined; the others grey, but for those far away.
    most = FAR * overall(found.runs(UNGUIDED))[0]
    far = [name for name in names if overall(found.runs(name))[0] > most]
    for axes, second, title in (
        (panels[0], "price", "passes of the network a step"),
        (panels[1], "recall", "recall"),
    ):
        if second != "price" and second not in found.metrics:
            axes.set_axis_off()
            continue
        on_front = found.front(second).rows if found.whole() else ()
        line: list[tuple[float, float]] = []
        labelled: list[tuple[float, float, str, bool]] = []
        for name in names:
            if name in far:
                continue
            y, dy = overall(found.runs(name))
            runs = found.prices(name) if second == "price" else found.runs(name, second)
            x, dx = overall(runs)
            lit = name in on_front
            line += [(x, y)] * lit
            axes.errorbar(
                x, y, xerr=_finite(dx) if second != "price" else None, yerr=_finite(dy), fmt="o",
                color=COLOURS[1] if lit else "0.6", markersize=5 if lit else 3.5, capsize=2,
                linewidth=0.8, zorder=3 if lit else 2,
            )  # fmt: skip
            if lit or name in ("CFG", UNGUIDED):
                labelled.append((x, y, name, lit))
        _label(axes, labelled)
        axes.plot(*zip(*sorted(line), strict=True), color=COLOURS[1], linewidth=1) if line else None
        axes.set(xlabel=title, ylabel="FD, lower is better", title=f"FD against {second}")
        axes.margins(y=0.15)
        if far:
            told = f"beyond {most:.2g}: {', '.join(far)}"
            axes.set_title("\n".join(wrap(f"FD against {second}; {told}", 60)), fontsize=9)
        axes.grid(alpha=0.3)
    # Changes with 95 % intervals; a filled mark survives retraining.
    axes = panels[2]
    shown = names[1:]
    for k, (against, title) in enumerate(SHORT.items()):
        for place, name in enumerate(shown):
            told = found.change(name, against)
            if told is None:
                continue
            half = _finite(told.high - told.mean)
            axes.errorbar(
                told.mean, place + 0.18 * (2 * k - 1), xerr=half, fmt="o", color=COLOURS[k],
                markersize=4.5, capsize=2, linewidth=1,
                markerfacecolor=COLOURS[k] if told.survives else "white",
                label=title if not axes.get_legend_handles_labels()[1].count(title) else None,
            )  # fmt: skip
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(shown)), shown, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.set(title="change of FD, 95 % interval; filled: survives", xlabel="change of FD")
    axes.grid(alpha=0.3, axis="x")
    if shown:
        axes.legend(fontsize=8, loc="best")
    figure.suptitle(
        f"{found.family}. {caption(found)} Bars: standard errors (left, middle).", fontsize=9
    )
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png")


def _label(axes: Any, points: Sequence[tuple[float, float, str, bool]]) -> None:
    """Name points by numbers, which a box tells, since names of near ones would overlap."""
    for number, (x, y, name, lit) in enumerate(sorted(points), start=1):
        axes.annotate(
            f"{number}", (x, y), xytext=(0, -13) if lit else (-8, -3), textcoords="offset points",
            ha="center", fontsize=7.5, zorder=4, color=COLOURS[1] if lit else "0.3",
        )  # fmt: skip
        axes.plot([], [], " ", label=f"{number}  {name}")
    if points:
        axes.legend(fontsize=7.5, handlelength=0, handletextpad=0, loc="best")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(study: Path, page: Path, images: Path) -> list[Findings]:
    """Fill the blocks of the page, and draw the figures and the pages with samples."""
    rows = read_rows(study)
    all_of = findings(rows)
    if not all_of:
        raise SystemExit(f"{study}: no unguided number yet; run python -m benchmarks.study first")
    rules = read_json_as(study / "rules.json", Rules)
    parts: Mapping[str, Callable[[], str]] = {
        "protocol": lambda: protocol(rules),
        "answers": lambda: answers(all_of),
        "tables": lambda: tables(all_of),
        "spread": lambda: spread(all_of),
        "fronts": lambda: fronts(all_of),
        "verdicts": lambda: verdicts(all_of),
        "missing": lambda: lacking(all_of, rows, rules),
    }

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]().strip()}\n\n{match[3]}"

    text = BLOCK.sub(filled, page.read_text(encoding="utf-8"))
    images.mkdir(parents=True, exist_ok=True)
    with atomic(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for found in all_of:
        draw(found, images / file_of(found))
        with atomic((images / file_of(found)).with_suffix(".json")) as temporary:
            temporary.write_text(cells(found.rows), encoding="utf-8")
        print(write_page(found, study, study / "pages" / file_of(found).removesuffix(".png")))
    return all_of


def main() -> None:
    """Write everything from the cells that there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/study"), help="the study's folder"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args()
    try:
        found: Any = write(options.out, options.page, options.images)
    except ValueError as error:
        parser.error(str(error))
    for each in found:
        print(f"{each.family}:", *each.answers(), sep="\n  ")
    print(options.page)


if __name__ == "__main__":
    main()
