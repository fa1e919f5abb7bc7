"""Quality against cost on the patches: ``python -m benchmarks.frontier [--out outputs/frontier]``.

Each lever alone and together, at the same seeds: three times 500 images, FD against
``patches:report``. The settings were chosen on ``patches:tune`` (``--tune`` measures there, another
seed). A lever is *free of loss* if its change against the full setting is within two standard
errors and the mean over seeds keeps 90 % of what the method does. It prints the table of
docs/performance.md, and draws ``docs/images/frontier.png``, beside which stands what went into it.
What was measured before is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sag_dit
from benchmarks.measure import ratio
from sag_dit.catalogue import entries
from sag_dit.data.requests import make_requests
from sag_dit.guidance import CFG, SAG, Term
from sag_dit.sampling import Settings
from sag_dit.sampling import draw as draw_images

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "frontier.png"
STEPS = 20


@dataclass(frozen=True)
class Row:
    """One setting: what it is called, what is drawn, and what it makes cheaper.

    ``base`` is the setting without the method, ``full`` the method without the lever.
    """

    title: str
    settings: str
    base: str | None = None
    full: str | None = None


FULL = "cfg_scale: 1.5, sag_scale: 3"
ROWS = {
    "unguided": Row("unguided", ""),
    "cfg": Row("CFG 1.5", "cfg_scale: 1.5", "unguided"),
    "sag": Row("SAG 0.5 from 0.5 to 1", "sag_scale: 0.5", "unguided"),
    "sag_second": Row(
        "SAG, every 2", "sag_scale: 0.5, guidance: {sag: {every: 2}}", "unguided", "sag"
    ),
    "full": Row("CFG 1.5 + SAG 3 from 0.5 to 1", FULL, "cfg"),
    "second": Row("CFG + SAG, every 2", f"{FULL}, guidance: {{sag: {{every: 2}}}}", "cfg", "full"),
    "third": Row("CFG + SAG, every 3", f"{FULL}, guidance: {{sag: {{every: 3}}}}", "cfg", "full"),
    "cfg_second": Row(
        "CFG, every 2", "cfg_scale: 1.5, guidance: {cfg: {every: 2}}", "unguided", "cfg"
    ),
    "both": Row(
        "CFG + SAG, both every 2",
        f"{FULL}, guidance: {{sag: {{every: 2}}, cfg: {{every: 2}}}}",
        "unguided",
        "full",
    ),
    "pag": Row(
        "PAG 0.1 from 0.5 to 1",
        "pag_scale: 0.1, guidance: {pag: {interval: [0.5, 1]}}",
        "unguided",
    ),
    "pag_second": Row(
        "PAG, every 2",
        "pag_scale: 0.1, guidance: {pag: {interval: [0.5, 1], every: 2}}",
        "unguided",
        "pag",
    ),
    "fewer": Row("CFG + SAG, 18 steps", f"{FULL}, steps: 18", "cfg", "full"),
    "fewest": Row("CFG + SAG, 14 steps", f"{FULL}, steps: 14", "cfg", "full"),
}


def measure(
    out: Path, tune: bool, rows: Mapping[str, Row] = ROWS, images: int = 500, seeds: int = 3
) -> None:
    """Measure all rows by ``evaluate.py``."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "ckpt=patches", "compare=none"]
    command += [f"num_images={images}", "batch_size=100", f"steps={STEPS}", "plots=false"]
    command += ["gallery.num=0", "trainer.accelerator=cpu"]
    command += [f"+compare.{key}={{{row.settings}}}" for key, row in rows.items()]
    command += ["reference=patches:tune", "seed=1000"] if tune else [f"seeds={seeds}"]
    subprocess.run([*command, f"out={out}", f"finished={out}/finished"], cwd=ROOT, check=True)


@dataclass(frozen=True)
class Measured:
    """A metric of each seed, and network passes of an image relative to unguided at 20 steps."""

    metrics: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
    passes: float

    @property
    def fd(self) -> float:
        """The mean FD."""
        return float(self.metrics["fid"].mean())


def read(out: Path, rows: Mapping[str, Row] = ROWS) -> dict[str, Measured]:
    """Return what was measured, in the order of the rows."""
    results = json.loads((out / "results.json").read_text("utf-8"))["results"]
    measured = {}
    for key, result in zip(rows, results, strict=True):
        cost = result["facts"]["cost"]
        metrics = {
            name: np.array([each["metrics"][name] for each in result["seeds"]])
            for name in ("fid", "precision", "recall")
        }
        measured[key] = Measured(metrics, cost["rows_per_step"] * cost["steps"] / STEPS)
    return measured


def ingredients() -> dict[str, Any]:
    """Return what the picture depends on today: the settings that are drawn, and the weights."""
    return {
        "rows": {key: row.settings for key, row in ROWS.items()},
        "steps": STEPS,
        "weights": entries()["patches"].sha256,
    }


def paired(left: Measured, right: Measured, metric: str) -> tuple[float, float]:
    """Return the mean change of a metric at the same seeds, and its standard error."""
    change = left.metrics[metric] - right.metrics[metric]
    error = float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else float("nan")
    return float(change.mean()), error


def table(measured: Mapping[str, Measured]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| setting | passes | FD | precision | recall | FD, by the lever | precision | recall "
        "| gain kept | free of loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in ROWS.items():
        here = measured[key]
        means = [here.metrics[name].mean() for name in ("precision", "recall")]
        cells = [row.title, f"{here.passes:.3g}", f"{here.fd:.2f}"]
        cells += [f"{mean:.3f}" for mean in means]
        if row.full is None or row.base is None:
            cells += [""] * 5
        else:
            full, base = measured[row.full], measured[row.base]
            change, error = paired(here, full, "fid")
            gain = base.fd - full.fd
            kept = (base.fd - here.fd) / gain
            free = gain > 0 and kept >= 0.9 and change <= 2 * error
            cells += [f"{change:+.3f} ± {error:.3f}"]
            for name in ("precision", "recall"):
                more, beside = paired(here, full, name)
                cells += [f"{more:+.3f} ± {beside:.3f}"]
            cells += [f"{kept:.0%}" if gain > 0 else "nothing is gained"]
            cells += ["**yes**" if free else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(measured: Mapping[str, Measured], file: Path) -> None:
    """Draw FD against passes; arrows lead from a method to its cheaper forms."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), constrained_layout=True)
    for key, row in ROWS.items():
        here = measured[key]
        lever = row.full is not None
        axes.plot(here.passes, here.fd, "o" if lever else "s", color=f"C{int(lever)}")
        if row.full is not None:
            there = measured[row.full]
            axes.annotate(
                "",
                xy=(here.passes, here.fd),
                xytext=(there.passes, there.fd),
                arrowprops={"arrowstyle": "->", "color": "0.7"},
            )
        offset = {"full": (0, -28), "second": (6, -14)}.get(key, (6, 6))
        axes.annotate(
            row.title,
            (here.passes, here.fd),
            textcoords="offset points",
            xytext=offset,
            horizontalalignment="center" if key == "full" else "left",
            fontsize=8,
        )
    axes.set_xlabel("network passes of an image, unguided in 20 steps = 1")
    axes.set_ylabel("FD, lower is better")
    axes.set_title("Patches, 3 x 500 images: squares are methods, circles their cheaper forms")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def times(rounds: int) -> str:
    """Return what some rows take in time, relative to unguided, beside their passes."""
    model = sag_dit.load("patches")
    requests = make_requests(25, 0, None, model.class_names)

    def work(*terms: Term) -> Callable[[], object]:
        settings = Settings(steps=STEPS, guidance=terms, batch_size=25, max_rows=25)
        return partial(draw_images, model, requests, settings)

    def sag(scale: float, every: int) -> SAG:
        return SAG(scale, layer="blocks.5", interval=(0.5, 1), every=every)

    lines = ["| setting | passes | time | quartiles |", "|---|---|---|---|"]
    for title, terms, passes in (
        ("CFG 1.5", (CFG(1.5),), 2.0),
        ("SAG, every 2", (sag(0.5, 2),), 1.25),
        ("CFG + SAG, every 3", (CFG(1.5), sag(3, 3)), 2.2),
        ("CFG + SAG, both every 2", (CFG(1.5, every=2), sag(3, 2)), 1.75),
    ):
        median, low, high = ratio(work(*terms), work(), rounds)
        lines.append(f"| {title} | {passes:g} | {median:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="outputs/frontier", type=Path)
    parser.add_argument("--tune", action="store_true", help="measure on patches:tune, one seed")
    parser.add_argument("--time", action="store_true", help="the time of some rows alone")
    options = parser.parse_args()
    if options.time:
        print(times(rounds=12))
        return
    if not (options.out / "results.json").exists():
        measure(options.out.resolve(), options.tune)
    measured = read(options.out)
    print(table(measured))
    if not options.tune:
        draw(measured, PICTURE)
        known = json.dumps(ingredients(), indent=1)
        PICTURE.with_suffix(".json").write_text(known + "\n", "utf-8")
        print(PICTURE)


if __name__ == "__main__":
    main()
