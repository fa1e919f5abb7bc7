"""Measure how time and memory grow: ``python -m benchmarks.scaling [--only images tokens ...]``.

    images   sample.py of the digits, two steps, 100 to 50,000 images: seconds, peak memory
    tokens   a pass of DiT-S/2 with and without reading one layer, 64 to 4,096 tokens
    terms    a guided evaluation with 0 to 6 terms, beside the passes that it needs
    ranks    sample.py of the patches on 1 to 4 ranks of one thread each

Passes are counted, not measured, and so exact. Figures are kept in ``docs/images/scaling.json``,
those of a part that is measured again replaced, and drawn as ``docs/images/scaling.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import median_seconds, peak_memory
from benchmarks.sizes import inputs, network
from sag_dit.attention import Capture
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG, SEG, SLG, TPG, GuidedDenoiser, Term, cost_of
from sag_dit.models import SIZES
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Step
from sag_dit.sampler import DDIM

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
TABLE = IMAGES / "scaling.json"
MIB = 2**20
COUNTS = (100, 1_000, 5_000, 20_000, 50_000)
TERMS: tuple[Term, ...] = (CFG(1.5), SAG(0.5), PAG(0.5), SEG(0.5), SLG(0.5), TPG(0.5))


class Figure(NamedTuple):
    """One figure: in which panel, on which line, at which x."""

    part: str
    line: str
    x: float
    y: float


def run(folder: Path, *arguments: str) -> tuple[float, float]:
    """Run ``sample.py``; return its seconds and the most memory of its first process in MiB."""
    command = [sys.executable, str(ROOT / "sample.py"), *arguments, f"out={folder}"]
    command += ["gallery.num=0", "trainer.accelerator=cpu", "sag_scale=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, used.ru_maxrss * 1024 / MIB


def images() -> Iterator[Figure]:
    """Draw more and more images."""
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as place:
            asked = ["ckpt=digits", "steps=2", "batch_size=100", f"num_images={count}"]
            seconds, memory = run(Path(place) / "set", *asked)
        yield Figure("images", "seconds", count, seconds)
        yield Figure("images", "peak memory, MiB", count, memory)


def tokens() -> Iterator[Figure]:
    """Pass longer and longer sequences."""
    for side in (16, 32, 64, 128):
        denoiser = ClassConditional(network(SIZES["DiT-S/2"], side), DDPM()).eval()
        x, _, y = inputs(side, 1, torch.float32)
        plain = partial(denoiser, x, denoiser.process.level(500), y)
        works: dict[str, Callable[[], object]] = {
            "a pass": plain,
            "one that reads a layer": partial(plain, [Capture(denoiser.layer("auto"))]),
        }
        for name, work in works.items():
            yield Figure("tokens", f"{name}: seconds", side**2 / 4, median_seconds(work, 5))
            yield Figure("tokens", f"{name}: MiB", side**2 / 4, peak_memory(work) / MIB)


def terms() -> Iterator[Figure]:
    """Add one term after another."""
    denoiser = ClassConditional(network(SIZES["DiT-S/2"], 32), DDPM()).eval()
    x, _, y = inputs(32, 2, torch.float32)
    step = Step(10, 20, denoiser.process.level(500), denoiser.process.level(480))
    unguided = 0.0
    for count in range(len(TERMS) + 1):
        chosen = TERMS[:count]
        guided = GuidedDenoiser(denoiser, chosen, noise=NoiseSource([0, 1], [0, 1]))
        seconds = median_seconds(partial(guided, x, step, y), 7)
        unguided = unguided or seconds
        yield Figure("terms", "measured", count, seconds / unguided)
        counted = cost_of(denoiser, chosen, DDIM(), 10)
        yield Figure("terms", "passes, counted", count, sum(counted.rows) / len(counted.rows))


def ranks() -> Iterator[Figure]:
    """Draw one set on more and more ranks."""
    for count in range(1, 5):
        with tempfile.TemporaryDirectory() as place:
            asked = ["ckpt=patches", "steps=20", "batch_size=20", "num_images=480"]
            seconds, _ = run(Path(place) / "set", *asked, f"trainer.devices={count}")
        yield Figure("ranks", "seconds", count, seconds)


PARTS: dict[str, tuple[Callable[[], Iterator[Figure]], str, str]] = {
    "images": (images, "Images: digits, 2 steps, start included", "images"),
    "tokens": (tokens, "Tokens: DiT-S/2, one image", "tokens"),
    "terms": (terms, "Terms: CFG, then SAG, PAG, SEG, SLG, TPG", "terms"),
    "ranks": (ranks, "Ranks: 480 patches, two cores, start included", "ranks"),
}


def read() -> list[Figure]:
    """Return the figures of before."""
    if not TABLE.exists():
        return []
    return [Figure(*each) for each in json.loads(TABLE.read_text("utf-8"))["figures"]]


def write(figures: list[Figure]) -> None:
    """Keep the figures, a line each."""
    lines = ",\n".join(f"  {json.dumps([*f[:3], float(f'{f.y:.4g}')])}" for f in figures)
    TABLE.write_text(f'{{"figures": [\n{lines}\n]}}\n', "utf-8")


def draw(figures: list[Figure], file: Path) -> None:
    """Draw a panel for each part; what is in other units gets an axis of its own."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for axes, (part, (_, title, x)) in zip(panels.flat, PARTS.items(), strict=True):
        lines: dict[str, list[Figure]] = {}
        for each in figures:
            if each.part == part:
                lines.setdefault(each.line, []).append(each)
        memory: Any = axes.twinx() if any("MiB" in name for name in lines) else None
        for number, (name, points) in enumerate(lines.items()):
            own = memory if "MiB" in name else axes
            style = "--" if "MiB" in name or "counted" in name else "-"
            colour = f"C{number}"
            places = [p.x for p in points], [p.y for p in points]
            own.plot(*places, "o" + style, color=colour, label=name, markersize=4)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel("times an unguided pass" if part == "terms" else "seconds")
        if part == "tokens":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            memory.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if part == "ranks":
            axes.set_xticks(range(1, 5))
        handles, names = axes.get_legend_handles_labels()
        if memory is not None:
            memory.set_ylabel("MiB")
            if part == "images":
                memory.set_ylim(bottom=0)
            more = memory.get_legend_handles_labels()
            handles, names = handles + more[0], names + more[1]
        axes.legend(handles, names, loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Measure, keep and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    figures = read()
    with torch.no_grad():
        for part in options.only:
            figures = [each for each in figures if each.part != part]
            for each in PARTS[part][0]():
                print(f"{each.part} | {each.line} | {each.x:g} | {each.y:.4g}", flush=True)
                figures.append(each)
            write(figures)
    draw(figures, IMAGES / "scaling.png")
    print(IMAGES / "scaling.png")


if __name__ == "__main__":
    main()
