"""What searches do to the bundled digits, and what they cost: the table of docs/search.md.

    python -m benchmarks.search [--num 500] [--steps 20]

All rows draw the same classes from the same seed, without guidance. The verifier is the bundled
classifier. Since a search favours whatever its verifier likes, accuracy is told by a second judge
as well, a support vector machine on the training digits that has seen nothing of the classifier;
and distances are measured in the classifier's features and, independent of it, in the first sixteen
principal components of the pixels. Recall is the share of the real digits that images come near.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.svm import SVC
from torch import Tensor

import sag_dit
from sag_dit.data.digits import digits
from sag_dit.evaluation.metrics import Moments, Statistics, frechet_distance, precision_recall
from sag_dit.sampler import DDIM, Sampler
from sag_dit.sampling import Search, Settings
from sag_dit.search import BestOf, FKSteering
from sag_dit.search.verifier import class_verifier

ROWS: Sequence[tuple[str, Sampler, Search | None]] = (
    ("no search, ddim", DDIM(), None),
    ("best of 2", DDIM(), BestOf(2)),
    ("best of 4", DDIM(), BestOf(4)),
    ("best of 8", DDIM(), BestOf(8)),
    ("no search, ddim with eta=1", DDIM(1.0), None),
    ("best of 4, eta=1", DDIM(1.0), BestOf(4)),
    ("fk, 4 particles, max", DDIM(1.0), FKSteering(4, every=4)),
    ("fk, 4 particles, sum", DDIM(1.0), FKSteering(4, every=4, potential="sum")),
    ("fk, 4 particles, diff", DDIM(1.0), FKSteering(4, every=4, potential="diff")),
)
COMPONENTS = 16


def statistics(features: Tensor) -> Statistics:
    """Return the mean and covariance of features (n, d)."""
    moments = Moments()
    moments.update(features)
    return moments.compute()


def flat(images: Tensor) -> Tensor:
    """Return images (n, c, h, w) in 0..255 as rows of numbers in [0, 1]."""
    return images.flatten(1).double() / 255


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    # The judges, and the real digits, which the model was not trained on.
    model = sag_dit.load("digits")
    classifier = class_verifier(model).classifier
    (train, known), (real, _) = digits("train"), digits("held_out")
    judge = SVC(gamma="scale").fit(flat(train).numpy(), known.numpy())
    mean = flat(train).mean(0)
    axes = torch.linalg.svd(flat(train) - mean, full_matrices=False)[2][:COMPONENTS].T
    real_pixels, real_pool = (flat(real) - mean) @ axes, classifier(real).pool
    # Each row at the same noise and classes.
    labels = torch.arange(asked.num) % 10
    print("| | passes | log p | accuracy | by another judge | FD | FD of pixels | recall |")
    print("|---|---|---|---|---|---|---|---|")
    for name, sampler, search in ROWS:
        settings = Settings.of(model, sampler=sampler, steps=asked.steps, search=search)
        images = sag_dit.sample(
            model, labels.tolist(), sampler=sampler, steps=asked.steps, search=search
        )
        features = classifier(images)
        log_p = features.logits.log_softmax(1).gather(1, labels[:, None])
        told = judge.predict(flat(images).numpy())
        pixels = (flat(images) - mean) @ axes
        numbers = (
            f"{settings.cost(model.denoiser).passes:g}",
            f"{log_p.mean():.3f}",
            f"{100 * (features.logits.argmax(1) == labels).double().mean():.1f} %",
            f"{100 * (told == labels.numpy()).mean():.1f} %",
            f"{frechet_distance(statistics(features.pool), statistics(real_pool)):.3f}",
            f"{frechet_distance(statistics(pixels), statistics(real_pixels)):.3f}",
            f"{precision_recall(real_pixels, pixels)[1]:.3f}",
        )
        print(f"| {name} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
