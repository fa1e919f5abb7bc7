"""FID, IS, precision and recall of given features: time and peak memory against other libraries.

    python -m benchmarks.metrics [--count 50000] [--width 2048] [--rounds 3] [--metrics fid is prc]

Features come in batches, as from a network. Every run is a process of its own; within a round the
libraries take turns, in another order each time, and medians over rounds are shown. Memory is the
highest resident size beyond that before the first batch. Linux only, for it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

LIBRARIES = {
    "fid": ("sag_dit", "torchmetrics", "torch-fidelity"),
    "is": ("sag_dit", "torchmetrics", "torch-fidelity"),
    "prc": ("sag_dit", "torch-fidelity"),
}
BATCH, BLOCK, CLASSES, SPLIT = 250, 2_500, 1_008, 5_000
REFERENCE = 10_000
"""Reference images of precision and recall, as in ADM's files."""


def batches(count: int, width: int, seed: int) -> Iterator[Tensor]:
    """Yield float32 features that no library has to wait for: a block of noise, scaled anew."""
    random = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, width, generator=random).relu()
    for start in range(0, count, BATCH):
        place = start % BLOCK
        rows = min(BATCH, count - start)
        yield block[place : place + rows] * (1 + (start // BLOCK) * 1e-3)


def resident() -> int:
    """Return the bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def highest() -> int:
    """Return the most bytes that were in use since :func:`forget_highest`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_highest() -> None:
    """Let the highest resident size begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def covariance(width: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of a reference."""
    random = torch.Generator().manual_seed(9)
    rows = torch.randn(2 * width, width, generator=random, dtype=torch.float64)
    return rows.mean(0), rows.T.cov()


def fid(library: str, count: int, width: int) -> Callable[[], float]:
    """Prepare the distance of streamed features to known statistics."""
    mean, known = covariance(width)
    if library == "sag_dit":
        from sag_dit.evaluation.metrics import FrechetDistance, Statistics

        def ours() -> float:
            metric = FrechetDistance(Statistics(REFERENCE, mean, known))
            for rows in batches(count, width, 0):
                metric.update(rows)
            return float(metric.compute())

        return ours
    if library == "torchmetrics":
        from torchmetrics.image.fid import FrechetInceptionDistance

        class Given(torch.nn.Module):
            num_features = width

            def forward(self, rows: Tensor) -> Tensor:
                return rows

        metric = FrechetInceptionDistance(Given(), input_img_size=(width,), normalize=True)
        metric.real_features_num_samples += REFERENCE
        metric.real_features_sum += mean * REFERENCE
        metric.real_features_cov_sum += known * (REFERENCE - 1)
        metric.real_features_cov_sum += REFERENCE * torch.outer(mean, mean)

        def streamed() -> float:
            for rows in batches(count, width, 0):
                metric.update(rows, real=False)
            return float(metric.compute())

        return streamed
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    other = {"mu": mean.numpy(), "sigma": known.numpy()}

    def held() -> float:
        rows = torch.cat(list(batches(count, width, 0)))
        # Its own pipeline leaves float32, in which NumPy would average too; the mean must be exact.
        own = fid_features_to_statistics(rows.double())
        return float(fid_statistics_to_metric(own, other, False)["frechet_inception_distance"])

    return held


def inception_score(library: str, count: int, width: int) -> Callable[[], float]:
    """Prepare the score of streamed logits, in splits of 5,000."""
    splits = max(1, count // SPLIT)
    if library == "sag_dit":
        from sag_dit.evaluation.metrics import InceptionScore

        def ours() -> float:
            metric, seen = InceptionScore(-(-count // splits)), 0
            for rows in batches(count, CLASSES, 1):
                metric.update(rows, torch.arange(seen, seen + len(rows)))
                seen += len(rows)
            return float(metric.compute())

        return ours
    if library == "torchmetrics":
        from torchmetrics.image.inception import InceptionScore as Theirs

        def listed() -> float:
            metric = Theirs(torch.nn.Identity(), splits=splits, normalize=True)
            for rows in batches(count, CLASSES, 1):
                metric.features.append(rows)
                metric._update_count += 1
            return float(metric.compute()[0])

        return listed
    from torch_fidelity.metric_isc import isc_features_to_metric

    def held() -> float:
        rows = torch.cat(list(batches(count, CLASSES, 1)))
        return float(isc_features_to_metric(rows, splits, False)["inception_score_mean"])

    return held


def prc(library: str, count: int, width: int) -> Callable[[], float]:
    """Prepare the sum of precision and recall against 10,000 reference features."""
    reference = torch.cat(list(batches(min(REFERENCE, count), width, 2)))
    if library == "sag_dit":
        from sag_dit.evaluation.metrics import PrecisionRecall

        def ours() -> float:
            metric, seen = PrecisionRecall(reference), 0
            for rows in batches(count, width, 0):
                metric.update(rows, torch.arange(seen, seen + len(rows)))
                seen += len(rows)
            return float(sum(metric.compute().values()))

        return ours
    from torch_fidelity.metric_prc import prc_features_to_metric

    def held() -> float:
        rows = torch.cat(list(batches(count, width, 0)))
        # The whole table of distances would take 10 GB.
        found = prc_features_to_metric(rows, reference, save_cpu_ram=True, verbose=False)
        return float(found["precision"] + found["recall"])

    return held


def run(metric: str, library: str, count: int, width: int) -> None:
    """Measure one run in this process and print it as JSON."""
    work = {"fid": fid, "is": inception_score, "prc": prc}[metric](library, count, width)
    before = resident()
    forget_highest()
    start = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - start
    print(json.dumps({"value": value, "seconds": seconds, "bytes": highest() - before}))


def main() -> None:
    """Print a table: our share of the others' time and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", choices=list(LIBRARIES), nargs="*", default=list(LIBRARIES))
    parser.add_argument("--one", nargs=2, metavar=("METRIC", "LIBRARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(*options.one, options.count, options.width)
        return
    size = ["--count", str(options.count), "--width", str(options.width)]
    print(f"{options.count:,} x {options.width:,}, torch {torch.__version__}, medians\n")
    print("| metric | against | time | memory | value |\n|---|---|---|---|---|")
    for metric in options.metrics:
        libraries = LIBRARIES[metric]
        found: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
        for turn in range(options.rounds):
            first = turn % len(libraries)
            for library in libraries[first:] + libraries[:first]:
                command = [sys.executable, "-m", "benchmarks.metrics", *size]
                done = subprocess.run(
                    [*command, "--one", metric, library],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found[library].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {
            library: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for library, runs in found.items()
        }
        ours = middle["sag_dit"]
        for library in libraries[1:]:
            theirs = middle[library]
            print(
                f"| {metric} | {library} | {ours['seconds'] / theirs['seconds']:.2f} | "
                f"{ours['bytes'] / theirs['bytes']:.2f} | {ours['value']:.6f}, "
                f"theirs {theirs['value']:.6f} |",
                flush=True,
            )
        features = options.count * (CLASSES if metric == "is" else options.width) * 4
        print(f"| {metric} | all features in float32 | | {ours['bytes'] / features:.2f} | |")


if __name__ == "__main__":
    main()
