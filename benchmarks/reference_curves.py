"""Reference curves of bundled recipes over seeds: ``python -m benchmarks.reference_curves``.

Each seed is a run of ``train.py experiment=digits`` with fewer steps, in a folder of its own. A
command that was stopped goes on. ``docs/images/reference_curves.json`` gets what every run has
logged in ``metrics.csv``; the picture beside it and the table in docs/training.md show mean and
spread. Recipes that were measured before stay in the file.

    python -m benchmarks.reference_curves --experiment patches --seeds 3 --steps 500
    python -m benchmarks.reference_curves --compare outputs/train/digits-1f3a/logs/metrics.csv

``--compare`` trains nothing: it tells how far a run of the recipe is from its reference. ``--draw``
writes picture and table again. A test sees that the page holds the table, and that the curves are
those of today's recipe, by its identity.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import ROOT, page
from sag_dit.cli import app
from sag_dit.cli.composing import compose
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.run_identity import identity
from sag_dit.cli.train import run_train
from sag_dit.files import atomic
from sag_dit.identity import digest

PAGE = ROOT / "docs" / "training.md"
BEGIN = "<!-- python -m benchmarks.reference_curves -->"
CURVES = ROOT / "docs" / "images" / "reference_curves.json"
SHOWN = {
    "train/loss": "training loss",
    "val/loss": "loss on held-out images",
    "metrics/fid": "FD",
    "train/grad_norm": "norm of the gradients",
}
"""Columns of the log that are drawn; the file holds others too."""
LEFT_OUT = ("step", "epoch", "images/s", "mfu", "memory_gb")
"""Columns that tell of the machine, or of nothing."""

Curve = dict[int, float]
"""step, from 0 -> value."""


def recipe(experiment: str, steps: int) -> list[str]:
    """Return the arguments of a run but for seed and folder; FD only where a run is long enough."""
    every = {"log": max(1, steps // 50), "validation": max(1, steps // 4), "preview": 10**9}
    track = {"every_n_steps": steps // 4, "num_images": 500, "steps": 20}
    return [
        f"experiment={experiment}",
        f"max_steps={steps}",
        *(f"every_n_steps.{name}={value}" for name, value in every.items()),
        *(["track=fid"] + [f"track.{name}={value}" for name, value in track.items()])
        * (steps >= 100),
    ]


def weights_of(arguments: Sequence[str]) -> str:
    """Return a hash of what determines the weights of a recipe's run with seed 0."""
    return digest(identity(to_dict(compose("train", [*arguments, "seed=0"]))))


def read(file: Path) -> dict[str, Curve]:
    """Return the columns of a ``metrics.csv``."""
    found: dict[str, Curve] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value and name not in LEFT_OUT:
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def joined(runs: Sequence[Mapping[str, Curve]]) -> dict[str, Any]:
    """Return each column's values of all runs, at the steps that all have.

    Example:
        >>> joined([{"a": {0: 1.0, 9: 2.0}}, {"a": {9: 4.0}}])
        {'a': {'step': [9], 'values': [[2.0], [4.0]]}}
    """
    columns = {}
    for name in runs[0]:
        steps = sorted(set.intersection(*(set(run.get(name, {})) for run in runs)))
        if steps:
            values = [[float(f"{run[name][step]:.5g}") for step in steps] for run in runs]
            columns[name] = {"step": steps, "values": values}
    return columns


def train(arguments: Sequence[str], seed: int, folder: Path) -> dict[str, Curve]:
    """Train one seed, or finish it, and return what it has logged."""
    app.launch("train", run_train, [*arguments, f"seed={seed}", f"out={folder}"])
    return read(folder / "logs" / "metrics.csv")


def over_seeds(curves: Mapping[str, Any], name: str) -> list[tuple[int, float, float]]:
    """Return (step, mean, standard deviation over the seeds) of a column."""
    column = curves["columns"][name]
    at = zip(column["step"], zip(*column["values"], strict=True), strict=True)
    return [(step, statistics.mean(each), statistics.stdev(each)) for step, each in at]


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw mean and range over the seeds, a row for each recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(SHOWN), 2.7 * len(found)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), len(SHOWN), squeeze=False)
    for row, (experiment, curves) in zip(axes, found.items(), strict=True):
        for axis, (name, title) in zip(row, SHOWN.items(), strict=True):
            if name not in curves["columns"]:
                axis.set_axis_off()
                continue
            axis.set_title(f"{experiment}: {title}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=8, which="both")
            column = curves["columns"][name]
            steps, each = column["step"], list(zip(*column["values"], strict=True))
            few = len(steps) < 10
            axis.fill_between(steps, [*map(min, each)], [*map(max, each)], alpha=0.3, lw=0)
            axis.plot(steps, [*map(statistics.mean, each)], "o-" if few else "-", ms=3, lw=1.2)
            axis.set_yscale("log" if max(map(max, each)) > 4 * min(map(min, each)) else "linear")
            axis.grid(alpha=0.3, which="both", lw=0.4)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png")


def section(found: Mapping[str, Any]) -> str:
    """Return the picture and a table in Markdown: the last value of each column over the seeds."""
    names = ", ".join(found)
    lines = [f"![Mean and range over seeds: {names}](images/{CURVES.stem}.png)", ""]
    for experiment, curves in found.items():
        asked, seeds = curves["arguments"], len(curves["seeds"])
        last = max(max(each["step"]) for each in curves["columns"].values())
        lines += [
            f"`{experiment}`, its first {last + 1:,} steps with {seeds} seeds, by",
            f"`python train.py {' '.join(asked)}`:",
            "",
            "| column | at row | mean | standard deviation over the seeds |",
            "|---|---|---|---|",
        ]
        for name in sorted(curves["columns"]):
            step, mean, spread = over_seeds(curves, name)[-1]
            lines.append(f"| `{name}` | {step:,} | {mean:.4g} | {spread:.2g} |")
        lines.append("")
    return "\n".join(lines).strip()


def publish(found: Mapping[str, Any]) -> None:
    """Draw the picture, and write the table into the page."""
    draw(found, CURVES.with_suffix(".png"))
    text = page(PAGE.read_text(encoding="utf-8"), section(found), BEGIN)
    PAGE.write_text(text, encoding="utf-8")


def compared(curves: Mapping[str, Any], mine: Mapping[str, Curve]) -> list[str]:
    """Return for each column how a run differs from the reference, at the last common row."""
    lines = []
    for name in sorted(curves["columns"].keys() & mine.keys()):
        common = [each for each in over_seeds(curves, name) if each[0] in mine[name]]
        if common:
            step, mean, spread = common[-1]
            value = mine[name][step]
            apart = f"{(value - mean) / spread:+.1f} deviations" if spread else "no spread"
            lines.append(
                f"{name:<24} row {step:>6,}: {value:.4g}, reference {mean:.4g} ± {spread:.2g} "
                f"({apart})"
            )
    return lines


def recorded() -> dict[str, Any]:
    """Return the curves that are published, by recipe."""
    there: dict[str, Any] = json.loads(CURVES.read_text("utf-8")) if CURVES.is_file() else {}
    return there


def main() -> None:
    """Train, write and draw, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("outputs/reference_curves"))
    parser.add_argument("--draw", action="store_true", help="picture and table, training nothing")
    parser.add_argument("--compare", type=Path, help="metrics.csv of a run of the recipe")
    asked = parser.parse_args()
    found = recorded()
    if asked.draw:
        publish(found)
        return
    if asked.compare:
        if asked.experiment not in found:
            told = ", ".join(found) or "none yet"
            parser.error(f"--experiment {asked.experiment}: curves are kept of {told}")
        print("\n".join(compared(found[asked.experiment], read(asked.compare))))
        return
    if asked.seeds < 2:
        parser.error(f"--seeds {asked.seeds}: expected 2 or more, for a spread")
    arguments, seeds = recipe(asked.experiment, asked.steps), list(range(asked.seeds))
    runs = [train(arguments, s, asked.out / f"{asked.experiment}-seed-{s}") for s in seeds]
    found[asked.experiment] = {
        "arguments": arguments,
        "weights": weights_of(arguments),
        "seeds": seeds,
        "columns": joined(runs),
    }
    with atomic(CURVES) as temporary:
        temporary.write_text(json.dumps(found, indent=None) + "\n", encoding="utf-8")
    publish(found)


if __name__ == "__main__":
    main()
