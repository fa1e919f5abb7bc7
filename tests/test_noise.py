"""The randomness of image i is a pure function of (seed, index, draw)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sag_dit.noise import START, NoiseSource, generator

words = st.integers(min_value=0, max_value=2**64 - 1)

PINNED = [-0.2933390, 1.7038306, 1.5391918, 1.5250869, 0.3117581, -0.0734515]
"""Seed 7, draw 0: three values of image 0, three of image 2^40."""


@given(seed=words, index=words, draw=st.integers(0, 2**40))
def test_a_stream_depends_on_its_key_alone(seed: int, index: int, draw: int) -> None:
    first = generator(seed, index, draw).standard_normal(5)
    generator(seed, index, draw + 1).standard_normal(100)
    np.random.default_rng(0).standard_normal(7)
    assert np.array_equal(first, generator(seed, index, draw).standard_normal(5))


def test_pinned_values() -> None:
    """What was drawn yesterday is drawn tomorrow, on any machine and with any NumPy."""
    x = NoiseSource([7, 7], [0, 2**40]).normal(START, (1, 1, 3))
    expected = torch.tensor(PINNED).reshape(2, 1, 1, 3)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_noise_of_an_image_ignores_its_neighbours() -> None:
    alone = NoiseSource([5], [3]).normal(2, (4, 8, 8))
    batch = NoiseSource([9, 5, 5], [3, 3, 4]).normal(2, (4, 8, 8))
    assert torch.equal(batch[1], alone[0])
    assert len({row.sum().item() for row in batch}) == 3


def test_noise_of_a_step_ignores_earlier_draws() -> None:
    fresh, used = NoiseSource([5], [3]), NoiseSource([5], [3])
    x = torch.empty(1, 4, 8, 8)
    for step in (0, 4, 1):
        used.like(x, step)
    torch.randn(10)
    assert torch.equal(used.like(x, 2), fresh.like(x, 2))


def test_streams_are_distinct() -> None:
    """Seeds, indices, draws and purposes that are neighbours, or swapped, share nothing."""
    keys = itertools.product((0, 1, 2, 2**63), (0, 1, 2, 2**63), (0, 1, 2), (0, 1, 2))
    values = [generator(*key).standard_normal(4) for key in keys]
    flat = np.concatenate(values)
    assert len(np.unique(flat)) == flat.size


def test_streams_do_not_run_into_the_next_draw() -> None:
    long = generator(0, 0, 0).random(200_000)
    assert not np.isin(generator(0, 0, 1).random(100), long).any()
    assert not np.isin(generator(0, 0, 0, purpose=1).random(100), long).any()


def test_x_T_and_the_first_step_differ() -> None:
    source = NoiseSource([0], [0])
    start = source.normal(START, (4, 8, 8))
    assert not torch.equal(start, source.like(start, 0))


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    """Of 64 images with 4,096 values each: five standard errors around the moments of N(0, 1)."""
    x = NoiseSource([0] * 64, range(64)).normal(START, (4, 32, 32)).double().flatten(1)
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    correlation = torch.corrcoef(x) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 6 / 4096**0.5


def test_like_follows_type_and_shape() -> None:
    source = NoiseSource([1, 2], [0, 0])
    x = torch.empty(2, 3, 4, 6, dtype=torch.bfloat16)
    noise = source.like(x, 0)
    assert noise.shape == x.shape and noise.dtype == x.dtype
    assert torch.equal(noise, source.normal(1, (3, 4, 6)).bfloat16())


def test_torch_generators_are_keyed_like_the_noise() -> None:
    def draws(source: NoiseSource, step: int) -> list[float]:
        return [torch.rand((), generator=g).item() for g in source.torch_generators(step)]

    both = draws(NoiseSource([1, 1], [0, 1]), 3)
    assert both[1] == draws(NoiseSource([1], [1]), 3)[0]
    assert (
        len({*both, *draws(NoiseSource([1, 1], [0, 1]), 4), *draws(NoiseSource([2], [0]), 3)}) == 5
    )


@pytest.mark.parametrize(
    ("seed", "index", "named"),
    [(-1, 0, "seed=-1"), (2**64, 0, "seed=18446744073709551616"), (0, -3, "index=-3")],
)
def test_keys_out_of_range_are_refused(seed: int, index: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*0 to 2\\^64 - 1"):
        generator(seed, index, 0)


@pytest.mark.parametrize(("draw", "purpose", "named"), [(-1, 0, "draw=-1"), (0, -1, "purpose=-1")])
def test_draws_out_of_range_are_refused(draw: int, purpose: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        generator(0, 0, draw, purpose)


def test_one_seed_per_image() -> None:
    with pytest.raises(ValueError):
        NoiseSource([1, 2], [0]).normal(START, (1,))
