"""Quality against cost of caches on the patches: ``python -m benchmarks.caches [--out FOLDER]``.

Each cache beside the same setting without it and beside as many passes in fewer steps: 200 images
at the same seeds, FD against ``patches:report``. It prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.frontier import Row, measure, read

CHEAPER = {
    "": "",
    ", every 2": "cache: {every: 2}",
    ", every 2, order 1": "cache: {every: 2, order: 1}",
    ", every 3, order 1": "cache: {every: 3, order: 1}",
    ", 10 steps": "steps: 10",
}
METHODS = {
    "unguided": "cfg_scale: 1",
    "CFG 1.5": "cfg_scale: 1.5",
    "CFG 1.5 + SAG 3": "cfg_scale: 1.5, sag_scale: 3",
}
ROWS = {
    f"row_{i}_{j}": Row(title + lever, f"{how}, {cheaper}".removesuffix(", "), full=f"row_{i}_0")
    for i, (title, how) in enumerate(METHODS.items())
    for j, (lever, cheaper) in enumerate(CHEAPER.items())
    # The longest runs in the two rows that matter most.
    if "SAG" not in title or lever in ("", ", every 2, order 1")
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="outputs/caches", type=Path)
    out = parser.parse_args().out
    if not (out / "results.json").exists():
        measure(out.resolve(), False, ROWS, images=200, seeds=1)
    measured = read(out, ROWS)
    print(
        "| setting | passes | FD | by the lever | precision | recall |\n|---|---|---|---|---|---|"
    )
    for key, row in ROWS.items():
        here, full = measured[key], measured[str(row.full)]
        change = "" if here is full else f"{here.fd - full.fd:+.2f}"
        rest = [f"{here.metrics[name].mean():.3f}" for name in ("precision", "recall")]
        print(
            "| "
            + " | ".join([row.title, f"{here.passes:.3g}", f"{here.fd:.2f}", change, *rest])
            + " |"
        )


if __name__ == "__main__":
    main()
