"""The published formulas in plain NumPy float64, nothing streamed, blocked or shared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import sqrtm

Array = NDArray[Any]


def made(stream: int, count: int, width: int, scale: float = 1.0, shift: float = 0.0) -> Array:
    """Features like a network's after its ReLU, the same on every machine."""
    random = np.random.Generator(np.random.Philox(key=[stream, 0]))
    values = random.standard_normal((count, width)) * scale + shift
    return np.maximum(values, 0).astype(np.float32)


def frechet(a: Array, b: Array) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the root by Schur's decomposition."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(first + second - 2 * sqrtm(first @ second).real))


def inception_score(logits: Array, split: int) -> float:
    """exp E KL(p(y|x) || p(y)) of consecutive splits, averaged."""
    weights = np.exp(logits.astype(np.float64))
    p = weights / weights.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(reference: Array, images: Array, k: int = 3) -> tuple[float, float]:
    """Shares of points within some ball of the other set, by differences of coordinates."""

    def apart(u: Array, v: Array) -> Array:
        return np.linalg.norm(u[:, None].astype(np.float64) - v[None], axis=2)

    reference_radii = np.sort(apart(reference, reference))[:, k]
    radii = np.sort(apart(images, images))[:, k]
    between = apart(images, reference)
    within = (between <= reference_radii[None]).any(1)
    covered = (between <= radii[:, None]).any(0)
    return float(within.mean()), float(covered.mean())


def density_coverage(reference: Array, images: Array, k: int = 5) -> tuple[float, float]:
    """Real balls that hold each image, of k, and the share of them that hold any."""
    real, drawn = reference.astype(np.float64), images.astype(np.float64)
    radii = [np.sort(np.linalg.norm(real - centre, axis=1))[k] for centre in real]
    inside = [
        np.linalg.norm(drawn - centre, axis=1) < radius
        for centre, radius in zip(real, radii, strict=True)
    ]
    return float(np.sum(inside) / (k * len(drawn))), float(np.mean([each.any() for each in inside]))


def kernel_distance(reference: Array, images: Array) -> float:
    """The unbiased squared MMD by (x y / d + 1)^3, pair by pair."""
    real, drawn = reference.astype(np.float64), images.astype(np.float64)

    def kernel(u: Array, v: Array) -> Array:
        return (np.einsum("id,jd->ij", u, v) / u.shape[1] + 1) ** 3

    def pairs(u: Array) -> float:
        return float(kernel(u, u)[~np.eye(len(u), dtype=bool)].mean())

    return pairs(real) + pairs(drawn) - 2 * float(kernel(real, drawn).mean())


def gaussian_distance(reference: Array, images: Array, sigma: float = 10.0) -> float:
    """1,000 times the squared MMD by exp(-|x - y|^2 / (2 sigma^2)), pairs of one included."""

    def mean(u: Array, v: Array) -> float:
        apart = np.square(u[:, None].astype(np.float64) - v[None]).sum(2)
        return float(np.exp(-apart / (2 * sigma**2)).mean())

    between = mean(reference, images)
    return 1000 * (mean(reference, reference) + mean(images, images) - 2 * between)


def vendi(images: Array) -> float:
    """exp of the entropy of the eigenvalues of the matrix of all cosines, over n."""
    rows = images.astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
