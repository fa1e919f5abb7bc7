"""Variance components, paired changes, and fronts with their errors."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from sag_dit.study.pareto import front, hypervolume
from sag_dit.study.variance import components, difference, holm, overall


def test_components_are_found_in_numbers_of_known_ones() -> None:
    random = np.random.default_rng(5)
    runs = {}
    for i in range(2000):
        level = random.normal(0, 3)
        runs[i] = {j: 10 + level + random.normal(0, 0.5) for j in range(2 + i % 3)}
    found = components(runs)
    assert found.training == pytest.approx(3, rel=0.05)
    assert found.sampling == pytest.approx(0.5, rel=0.05)


def test_components_of_equal_groups_are_the_textbook_s() -> None:
    found = components({0: {0: 1.0, 1: 3.0}, 1: {0: 7.0, 1: 9.0}})
    # MSW = 2, MSB = 2 * (3^2 + 3^2) = 36.
    assert found.sampling == pytest.approx(2**0.5)
    assert found.training == pytest.approx(17**0.5)


def test_what_cannot_be_told_is_nan() -> None:
    alone = components({0: {0: 1.0, 1: 2.0}})
    assert math.isnan(alone.training) and alone.sampling == pytest.approx(0.5**0.5)
    once = components({0: {0: 1.0}, 1: {0: 2.0}})
    assert math.isnan(once.sampling) and once.training == pytest.approx(0.5**0.5)
    # Trainings that differ less than their samplings do.
    assert components({0: {0: 1.0, 1: 3.0}, 1: {0: 1.0, 1: 3.0}}).training == 0


def test_changes_are_paired_by_training_and_sampling() -> None:
    base = {0: {0: 10.0, 1: 20.0}, 1: {0: 50.0}, 2: {0: 30.0}}
    row = {0: {0: 9.0, 1: 18.0, 2: 0.0}, 1: {0: 48.7}, 2: {0: 28.6}, 3: {0: 0.0}}
    found = difference(row, base)
    assert found is not None
    changes = [-1.5, -1.3, -1.4]
    assert found.mean == pytest.approx(fmean(changes))
    assert found.error == pytest.approx(stdev(changes) / 3**0.5)
    # Student's t of two degrees of freedom: 4.303.
    assert found.high - found.mean == pytest.approx(4.3027 * found.error, rel=1e-4)
    assert found.survives and found.trainings == 3


def test_one_training_says_nothing_of_another() -> None:
    found = difference({0: {0: 1.0, 1: 1.1}}, {0: {0: 9.0, 1: 9.1}})
    assert found is not None and found.mean == pytest.approx(-8)
    assert not found.survives
    assert difference({0: {0: 1.0}}, {1: {0: 1.0}}) is None


def test_looking_at_many_changes_costs() -> None:
    assert holm({"a": 0.02, "b": 0.5, "c": math.nan}) == {"a": 0.04, "b": 0.5}
    assert holm({"a": 0.9, "b": 0.8})["a"] == 1


def test_means_are_over_trainings() -> None:
    assert overall({0: {0: 1.0, 1: 3.0}, 1: {0: 6.0}}) == (4.0, 2.0)
    mean, error = overall({0: {0: 1.0}})
    assert mean == 1 and math.isnan(error)


def test_the_area_is_that_of_squares_counted_one_by_one() -> None:
    points = [(1.0, 6.0), (3.0, 3.0), (6.0, 1.0), (7.0, 7.0), (3.0, 4.0)]
    counted = sum(
        any(x <= i and y <= j for x, y in points) for i in range(1, 8) for j in range(1, 8)
    )
    assert hypervolume(points, (8.0, 8.0)) == counted


def test_a_front_tells_how_sure_it_is() -> None:
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0}
    price = {name: {i: {0: cost} for i in range(4)} for name, cost in costs.items()}
    rows = {
        "a": {i: {0: 10.0 + i} for i in range(4)},
        "b": {i: {0: 8.0 + i} for i in range(4)},
        # Better than b in two trainings of four, by as much as it is worse in the others.
        "c": {i: {0: 8.1 + i + (-1) ** i} for i in range(4)},
        "d": {i: {0: 12.0 + i} for i in range(4)},
    }
    found = front(rows, price)
    assert found.rows == ("a", "b")
    # Rows move together from training to training, so a and d are as sure as can be.
    assert found.chance["a"] == 1 and found.chance["d"] == 0
    assert 0.2 < found.chance["c"] < 0.6
    assert found.volume == pytest.approx(hypervolume([(11.5, 1), (9.5, 2)], found.corner))
    assert found.error > 0
    assert found.corner == (13.5, 3)
    with pytest.raises(ValueError, match="no seed in common"):
        front({"a": {0: {0: 1.0}}, "b": {1: {0: 1.0}}}, price)
