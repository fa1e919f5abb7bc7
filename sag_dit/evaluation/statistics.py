"""Mean and covariance of features, and the Fréchet distance of two such pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
COLUMNS = 256
"""Columns multiplied at once, so that no second matrix is held beside a product."""


class Statistics(NamedTuple):
    """Mean (d) and unbiased covariance (d, d) of ``number`` vectors, None if that is not known.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> frechet_distance(Statistics(9, one[0], one), Statistics(9, 3 * one[0], one))
        4.0
    """

    number: int | None
    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the squared Fréchet distance of two normal distributions.

        |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

    With A = F F^T, the non-zero eigenvalues of A B are those of the symmetric F^T B F. So the last
    trace is a sum of square roots of non-negative numbers, also where A or B is singular.

    Raises:
        ValueError: the two differ in dimension, or hold values that are not finite.

    Source: Heusel et al., arXiv 1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {a.mean.numel()} and {b.mean.numel()} dimensions: expected the same "
            f"network and preprocessing on both sides"
        )
    if a.number is not None and b.number is not None and b.number < a.number:
        a, b = b, a  # the smaller set has a covariance of lower rank, and so a smaller factor F
    for each in (a, b):
        if not (each.mean.isfinite().all() and each.covariance.isfinite().all()):
            raise ValueError("the statistics hold NaN or infinity: expected finite features")
    difference = a.mean - b.mean
    trace = a.covariance.trace() + b.covariance.trace()
    distance = difference @ difference + trace - 2 * _trace_of_root(a.covariance, b.covariance)
    return max(0.0, float(distance))


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    factor = _factor(a)
    width = factor.shape[1]
    product = a.new_empty(width, width)
    for start in range(0, width, COLUMNS):
        columns = slice(start, start + COLUMNS)
        product[:, columns] = factor.T @ (b @ factor[:, columns])
    del factor
    roots: Tensor = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return roots.sum()


def _factor(a: Tensor) -> Tensor:
    """Return F (d, r) with F F^T = A: by Cholesky, or of A's rank by eigenvectors if singular."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:
        values, vectors = torch.linalg.eigh(a)
        kept = values > len(values) * EPSILON * values[-1].clamp(min=0)
        factor = vectors[:, kept] * values[kept].sqrt()
    return factor
