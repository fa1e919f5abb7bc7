"""Measure what writing images costs beside drawing them: ``python -m benchmarks.writing``.

A set of 256 x 256 images of a tiny network is drawn three times by turns: written to nowhere,
written between the batches, and written behind, on a thread of its own, as ``sample.py`` does. The
last should cost no more than the first where the machine has a core to spare.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from benchmarks.measure import randomise
from sag_dit.checkpoints import from_denoiser
from sag_dit.cli.app import quiet_lightning
from sag_dit.codec import IdentityCodec
from sag_dit.data.requests import make_requests
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.noise import START, NoiseSource
from sag_dit.output.folder import SampleFolder
from sag_dit.process import DDPM
from sag_dit.sampling import Settings
from sag_dit.training.predicting import Predictor

SIZE = 256
WAYS = ("nowhere", "between", "behind")


def drawing(way: str, images: int, batch: int, steps: int) -> float:
    """Draw a set into a new folder and return the seconds it took."""
    torch.manual_seed(0)
    network = DiT(SIZE, 16, 3, 192, 4, 3, num_classes=10, learn_sigma=False)
    randomise(network)
    codec = IdentityCodec()
    model = from_denoiser(ClassConditional(network, DDPM()).eval(), "tiny", codec=codec)
    pending = make_requests(images, 0, None, model.class_names)
    settings = Settings(steps=steps, batch_size=batch)
    with tempfile.TemporaryDirectory() as place:
        folder = SampleFolder(Path(place))
        folder.claim({}, {})
        predictor = Predictor(partial(Trainer, accelerator="cpu", devices=1), folder.path)
        start = time.perf_counter()
        if way == "behind":
            predictor.draw(model, pending, settings, write=folder.write)
        else:
            consumers = [folder.write] if way == "between" else []
            predictor.draw(model, pending, settings, consumers)
        took = time.perf_counter() - start
        written = len(list((folder.path / "images").glob("*.png")))
    if written != images * (way != "nowhere"):
        raise RuntimeError(f"{way}: {written} of {images} images were written")
    return took


def noise(batch: int, rounds: int) -> float:
    """Return the median seconds that a batch's first noise takes."""
    source = NoiseSource([0] * batch, list(range(batch)))
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        source.normal(START, (3, SIZE, SIZE))
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    """Print a row for each way, and what a batch's noise takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    quiet_lightning()
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        # In turned order, so that what else the machine does meets all alike; the first warms up.
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            seconds = drawing(way, options.images, options.batch, options.steps)
            took[way] += [seconds] * (number > 0)
    print("| written | s, median | quartiles | of nowhere |\n|---|---|---|---|")
    base = statistics.median(took["nowhere"])
    for way, all_of_it in took.items():
        low, median, high = statistics.quantiles(all_of_it, n=4)
        print(f"| {way} | {median:.2f} | {low:.2f} to {high:.2f} | {median / base:.2f} |")
    print(f"\nfirst noise of a batch: {1000 * noise(options.batch, options.rounds):.0f} ms")


if __name__ == "__main__":
    main()
