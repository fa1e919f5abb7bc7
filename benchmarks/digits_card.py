"""How good the bundled digits are, and what guidance does to them.

    python benchmarks/digits_card.py [--ckpt digits] [--num 1000] [--steps 50]

Prints, for unguided samples and several guidance settings: how often a classifier fitted on the
real training digits recognises the class, the Frechet distance of pixels to the held-out digits,
and how near the samples are to their nearest training image, against how near real held-out digits
are. Everything is seeded; the table of the model card is this script's output.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC

import sag_dit
from sag_dit.data.digits import digits
from sag_dit.guidance import CFG, SAG, Term

Vectors = NDArray[np.float64]

SETTINGS: dict[str, list[Term]] = {
    "unguided": [],
    "SAG 0.5": [SAG(scale=0.5)],
    "SAG 1.0": [SAG(scale=1.0)],
    "SAG 1.5": [SAG(scale=1.5)],
    "CFG 1.5": [CFG(scale=1.5)],
    "CFG 1.5 + SAG 0.5": [CFG(scale=1.5), SAG(scale=0.5)],
}


def vectors(images: torch.Tensor) -> Vectors:
    """Flatten uint8 images to values in [0, 1]."""
    return (images.flatten(1).double() / 255).numpy()


def frechet(a: Vectors, b: Vectors) -> float:
    """Frechet distance of two Gaussians fitted to pixels: |m - n|^2 + tr(A + B - 2 (A B)^(1/2))."""
    mean = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, basis = np.linalg.eigh(first)
    root = basis * np.sqrt(np.clip(values, 0, None)) @ basis.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * cross)


def nearest(a: Vectors, b: Vectors) -> Vectors:
    """Euclidean distance of each row of ``a`` to its nearest row of ``b``."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None).min(1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="digits")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    options = parser.parse_args()

    train_images, train_labels = digits("train")
    real_images, real_labels = digits("held_out")
    train, real = vectors(train_images), vectors(real_images)
    judge = SVC(gamma=0.25, C=10).fit(train, train_labels.numpy())
    accuracy = judge.score(real, real_labels.numpy())
    print(f"classifier on {len(real)} held-out real digits: {accuracy:.1%} right")
    floor = nearest(real, train)
    print(
        f"held-out real digits to nearest training digit: median {np.median(floor):.2f}, "
        f"1st percentile {np.quantile(floor, 0.01):.2f}"
    )
    model = sag_dit.load(options.ckpt)
    classes = [i % 10 for i in range(options.num)]
    print("| guidance | recognised | Frechet | nearest, median | below real 1 % |")
    print("|---|---|---|---|---|")
    for name in options.only:
        images = sag_dit.sample(
            model,
            classes,
            guidance=SETTINGS[name],
            steps=options.steps,
            batch_size=options.batch_size,
        )
        drawn = vectors(images)
        distance = nearest(drawn, train)
        recognised = float((judge.predict(drawn) == np.array(classes)).mean())
        close = float((distance < np.quantile(floor, 0.01)).mean())
        print(
            f"| {name} | {recognised:.1%} | {frechet(drawn, real):.3f} | "
            f"{np.median(distance):.2f} | {close:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
