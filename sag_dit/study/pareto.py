"""Pareto fronts of measured rows, with how sure they are: two numbers, of both less is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from sag_dit.study.tuning import Point, fronts
from sag_dit.study.variance import Runs

TIMES = 1000
"""Resamples of the bootstrap."""


@dataclass(frozen=True)
class Front:
    """The rows that none is better than in both numbers, and the area that they dominate.

    ``rows`` are in the order of the second number. ``chance`` is how often each row, of all, is on
    the front of a resample. ``volume`` is the hypervolume up to ``corner``, and ``error`` its
    standard error.

    Example:
        >>> price = {"a": {0: {0: 1.0}}, "b": {0: {0: 2.0}}}
        >>> front({"a": {0: {0: 2.0}}, "b": {0: {0: 1.0}}}, price).rows
        ('a', 'b')
    """

    rows: Sequence[str]
    chance: Mapping[str, float]
    volume: float
    error: float
    corner: Point


def hypervolume(points: Sequence[Point], corner: Point) -> float:
    """Return the area between a corner and what the points dominate; of both numbers less is good.

    Example:
        >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], corner=(3.0, 3.0))
        3.0
    """
    area, top = 0.0, corner[1]
    for x, y in sorted(points):
        if x < corner[0] and y < top:
            area += (corner[0] - x) * (top - y)
            top = y
    return area


def front(
    rows: Mapping[str, Runs], other: Mapping[str, Runs], corner: Point | None = None
) -> Front:
    """Return the front of rows by a number of theirs and another one, such as the price.

    Of both numbers less is better: negate one of which more is. Errors are from a bootstrap over
    training seeds and, within each, sampling seeds, the same for all rows, since rows are paired.
    The corner is the worst value of each number unless it is given; areas to the same corner can
    be compared. Only seeds that all rows have count.

    Raises:
        ValueError: there is no seed that all rows have.
    """
    seeds = _shared([*rows.values(), *other.values()])
    if not seeds:
        raise ValueError("these rows have no seed in common: expected one or more, for all rows")

    def points(drawn: Sequence[Sequence[tuple[int, int]]]) -> list[Point]:
        def mean(runs: Runs) -> float:
            return fmean(fmean(runs[i][j] for i, j in each) for each in drawn)

        return [(mean(runs), mean(other[name])) for name, runs in rows.items()]

    # The front as measured; its area ends at the worst of both numbers.
    measured = points([[(i, j) for j in seeds[i]] for i in seeds])
    if corner is None:
        corner = (max(x for x, _ in measured), max(y for _, y in measured))
    # Resample trainings and, within each, samplings; rows keep the noise that they share.
    names, trainings = list(rows), list(seeds)
    random = np.random.default_rng(0)
    counts, volumes = dict.fromkeys(names, 0), []
    for _ in range(TIMES):
        chosen = random.choice(trainings, len(trainings)).tolist()
        drawn = [[(i, j) for j in random.choice(seeds[i], len(seeds[i])).tolist()] for i in chosen]
        resampled = points(drawn)
        for place in fronts(resampled)[0]:
            counts[names[place]] += 1
        volumes.append(hypervolume(resampled, corner))
    return Front(
        rows=tuple(names[place] for place in fronts(measured)[0]),
        chance={name: count / TIMES for name, count in counts.items()},
        volume=hypervolume(measured, corner),
        error=stdev(volumes),
        corner=corner,
    )


def _shared(of_rows: Sequence[Runs]) -> dict[int, list[int]]:
    """Return the training seeds that all have, each with the sampling seeds that all have."""
    trainings = set.intersection(*(set(runs) for runs in of_rows))
    found = {i: sorted(set.intersection(*(set(runs[i]) for runs in of_rows))) for i in trainings}
    return {i: found[i] for i in sorted(found) if found[i]}
