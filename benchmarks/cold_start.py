"""CPU time of commands that draw little or nothing, beside ``import torch``.

    python -m benchmarks.cold_start [--rounds 12]

Each round starts every program once, in turn. Printed are medians of their CPU seconds, user and
system, with quartiles, and the median of their ratios to ``import torch`` of the same round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]


def programs(folder: Path) -> dict[str, list[str]]:
    """Return what is started, by name."""
    drawing = ["sample.py", "ckpt=digits", "num_images=1", "steps=2", "trainer.accelerator=cpu"]
    evaluating = ["evaluate.py", "ckpt=digits", "num_images=20", "steps=2", "batch_size=20"]
    evaluating += ["trainer.accelerator=cpu", "sag_scale=0.5", "confidence.repeats=0"]
    return {
        "import torch": ["-c", "import torch"],
        "sample.py, refused": [*drawing, f"out={folder}/finished", "num_images=0"],
        "sample.py, finished before": [*drawing, f"out={folder}/finished"],
        "sample.py, one image in two steps": [*drawing, f"out={folder}/ROUND"],
        "evaluate.py, finished before": [*evaluating, f"out={folder}/measured"],
    }


def seconds(arguments: list[str], folder: Path) -> float:
    """Run a Python program and return its CPU seconds."""
    with (folder / "printed.txt").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "SAG_DIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=printed,
        )
        _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print one row for each program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = programs(folder)
        taken: dict[str, list[float]] = {name: [] for name in started}
        # The first round fills folders and caches, and does not count.
        for number in range(options.rounds + 1):
            for name, arguments in started.items():
                words = [each.replace("ROUND", str(number)) for each in arguments]
                taken[name].append(seconds(words, folder))
    base = taken["import torch"][1:]
    print("| program | CPU seconds, median (quartiles) | of `import torch` |\n|---|---|---|")
    for name, (_, *values) in taken.items():
        low, _, high = quantiles(values, n=4)
        ratio = median(each / torch for each, torch in zip(values, base, strict=True))
        print(f"| {name} | {median(values):.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
