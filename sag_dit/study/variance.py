"""Variance components: how much of a number is the training's luck, how much the sampling's.

Retraining a model moves FID more than drawing again, so a difference that is seen on one model may
be gone on the next. Here the two are told apart, and differences are paired by training seed.

Source: The FID Lottery (arXiv 2606.20536); Searle, Casella & McCulloch 1992, 3.6 (estimators).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

Runs = Mapping[int, Mapping[int, float]]
"""A number by training seed and, within it, by sampling seed."""


@dataclass(frozen=True)
class Components:
    """The standard deviations of a number over trainings and over samplings of one training.

    Either is NaN where it cannot be told: with one training, or one sampling seed for each.

    Example:
        >>> round(components({0: {0: 1.0, 1: 1.2}, 1: {0: 3.0, 1: 3.2}}).training, 2)
        1.41
    """

    training: float
    sampling: float


def components(runs: Runs) -> Components:
    """Return both from the random-effects analysis of variance y_ij = mu + a_i + e_ij.

    i is the training seed, j the sampling seed. With k trainings of n_i samplings, N in all,
    MSW = sum_ij (y_ij - y_i)^2 / (N - k) estimates var(e), and
    MSB = sum_i n_i (y_i - y)^2 / (k - 1) estimates var(e) + n_0 var(a), where
    n_0 = (N - sum_i n_i^2 / N) / (k - 1). So var(a) = (MSB - MSW) / n_0, or 0 where that is
    negative. With one sampling each, the spread over trainings holds both: training is it all.

    Example:
        >>> components({0: {0: 1.0, 1: 3.0}, 1: {0: 2.0, 1: 4.0}}).training
        0.0
    """
    groups = [list(each.values()) for each in runs.values() if each]
    k, total = len(groups), sum(map(len, groups))
    within = math.nan
    if total > k:
        squares = sum((y - fmean(each)) ** 2 for each in groups for y in each)
        within = squares / (total - k)
    if k < 2:
        return Components(math.nan, math.sqrt(within))
    mean = fmean(y for each in groups for y in each)
    between = sum(len(each) * (fmean(each) - mean) ** 2 for each in groups) / (k - 1)
    n_0 = (total - sum(len(each) ** 2 for each in groups) / total) / (k - 1)
    of_training = (between - (0.0 if math.isnan(within) else within)) / n_0
    return Components(math.sqrt(max(0.0, of_training)), math.sqrt(within))


@dataclass(frozen=True)
class Difference:
    """What a row changes against another one, over trainings.

    ``mean`` is the mean over training seeds of the mean change at the same sampling seeds, and
    ``error`` its standard error, from how the change differs between trainings. ``low`` and
    ``high`` bound it with 95 % confidence (Student's t), and ``p`` is the chance of as large a
    change, of either sign, where there is none. With one training ``error`` is that over sampling
    seeds, and says nothing of another training: ``trainings`` tells how many there were.

    Example:
        >>> found = difference({0: {0: 9.0}, 1: {0: 7.0}}, {0: {0: 10.0}, 1: {0: 8.5}})
        >>> found.mean, found.trainings, found.survives
        (-1.25, 2, False)
    """

    mean: float
    error: float
    low: float
    high: float
    p: float
    trainings: int

    @property
    def survives(self) -> bool:
        """Whether the change differs from 0 over several trainings, with 95 % confidence."""
        return self.trainings > 1 and self.p < 0.05


def difference(row: Runs, base: Runs) -> Difference | None:
    """Return what ``row`` changes against ``base`` at the seeds that both have; None without any.

    The rows share the noise of their images and the weights, so most of what varies from seed to
    seed is in both and cancels.

    Example:
        >>> difference({0: {0: 9.0}, 1: {0: 7.0}}, {0: {0: 10.0}, 1: {0: 9.0}}).mean
        -1.5
    """
    changes = []
    for training, runs in row.items():
        shared = runs.keys() & base.get(training, {}).keys()
        if shared:
            changes.append([runs[seed] - base[training][seed] for seed in sorted(shared)])
    if not changes:
        return None
    # Over trainings where there are several, else over the samplings of the only one.
    of_training = [fmean(each) for each in changes]
    values = of_training if len(changes) > 1 else changes[0]
    return _of(fmean(of_training), values, len(changes))


def confident(count: int) -> float:
    """Return how many standard errors hold 95 % of what may be, of the mean of ``count`` values.

    Example:
        >>> round(confident(3), 2)
        4.3
    """
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


def _of(mean: float, values: Sequence[float], trainings: int) -> Difference:
    """Return a mean with its interval, of values that vary independently."""
    from scipy.stats import t

    if len(values) < 2:
        return Difference(mean, math.nan, math.nan, math.nan, math.nan, trainings)
    error = stdev(values) / math.sqrt(len(values))
    freedom = len(values) - 1
    half = confident(len(values)) * error
    p = 2 * float(t.sf(abs(mean) / error, freedom)) if error > 0 else float(mean == 0)
    return Difference(mean, error, mean - half, mean + half, p, trainings)


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Return chances p that allow for as many differences having been looked at, by Holm's method.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    ordered = sorted(
        ((name, p) for name, p in chances.items() if not math.isnan(p)), key=lambda each: each[1]
    )
    adjusted, highest = {}, 0.0
    for place, (name, p) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - place) * p))
        adjusted[name] = highest
    return adjusted


def overall(runs: Runs) -> tuple[float, float]:
    """Return the mean over trainings of their means, and its standard error over trainings.

    With one training the error is over its samplings; it is NaN where there is one number alone.

    Example:
        >>> overall({0: {0: 1.0}, 1: {0: 3.0}})
        (2.0, 1.0)
    """
    means = [fmean(each.values()) for each in runs.values() if each]
    values = means if len(means) > 1 else [y for each in runs.values() for y in each.values()]
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(means), math.sqrt(variance(values) / len(values))
