"""The discrete process: its tables, its grids and its posterior."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sag_dit.process import DDPM, NoiseLevel
from sag_dit.process.ddpm import CLEAN, Posterior, respace

SCHEDULES = ["linear", "cosine"]


def test_linear_table_is_that_of_the_paper() -> None:
    """alpha_bar as an exact product of 1 - beta, beta_t = 1e-4 + t (0.02 - 1e-4) / 999."""
    product = Fraction(1)
    exact = []
    for t in range(1000):
        product *= 1 - (Fraction(1, 10_000) + t * (Fraction(2, 100) - Fraction(1, 10_000)) / 999)
        product = product.limit_denominator(10**40)
        exact.append(float(product))
    assert DDPM().alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(DDPM().alphas_cumprod, exact, rtol=1e-12)


def test_linear_betas_of_fewer_times_reach_the_same_noise() -> None:
    """The scaled betas keep T times the mean beta, so alpha_bar at the end hardly depends on T."""
    ends = [math.log(DDPM(num_timesteps=n).alphas_cumprod[-1]) for n in (1000, 4000)]
    assert ends[0] == pytest.approx(ends[1], rel=0.01)
    assert DDPM(num_timesteps=4000).betas[[0, -1]].tolist() == pytest.approx([2.5e-5, 5e-3])


def test_cosine_table_is_that_of_the_paper() -> None:
    """Where no beta is capped, alpha_bar_t = f(t) / f(0); the last beta is capped at 0.999."""

    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    table = DDPM("cosine").alphas_cumprod
    expected = [f(t + 1) / f(0) for t in range(999)]
    np.testing.assert_allclose(table[:999], expected, rtol=1e-9)
    assert DDPM("cosine").betas[-1] == 0.999
    assert table[-1] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_on_the_curve_at_every_t(schedule: str) -> None:
    process = DDPM(schedule)  # type: ignore[arg-type]
    levels = [process.level(t) for t in range(1000)]
    for level, squared in zip(levels, process.alphas_cumprod, strict=True):
        assert isinstance(level.alpha, float) and isinstance(level.sigma, float)
        assert level.alpha**2 == pytest.approx(squared, rel=1e-14)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-14)
        assert (level.d_alpha, level.d_sigma) == (-level.sigma, level.alpha)
    sigmas = [level.sigma for level in levels]
    assert all(a < b for a, b in itertools.pairwise(sigmas))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_eps_comes_back_in_float32_at_both_ends(schedule: str, t: int) -> None:
    process = DDPM(schedule)  # type: ignore[arg-type]
    x_0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(t))
    level = process.level(t)
    x_t = process.add_noise(x_0, eps, level)
    prediction = process.predict(x_t, level, eps, "eps")
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-5, atol=1e-5)
    # What rounding x_t loses of x_0 grows by sigma / alpha, whatever the network puts out.
    lost = 2e-6 * (1 + level.sigma / level.alpha)
    torch.testing.assert_close(prediction.x_0, x_0, rtol=lost, atol=lost)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_round_trips_at_every_t(schedule: str) -> None:
    process = DDPM(schedule)  # type: ignore[arg-type]
    x_0, eps = torch.randn(
        2, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for t in range(1000):
        level = process.level(t)
        x_t = process.add_noise(x_0, eps, level)
        for kind in ("eps", "v", "x_0"):
            output = process.target(x_0, eps, level, kind)  # type: ignore[arg-type]
            prediction = process.predict(x_t, level, output, kind)  # type: ignore[arg-type]
            torch.testing.assert_close(prediction.x_0, x_0, rtol=0, atol=1e-10)
            torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-10)


def test_levels_of_a_batch_are_those_of_its_images() -> None:
    process = DDPM("cosine")
    t = torch.tensor([0, 999, 500])
    batch = process.level(t)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        values = getattr(batch, name)
        assert values.shape == (3, 1, 1, 1) and values.dtype == torch.float32
        single = [getattr(process.level(int(each)), name) for each in t]
        torch.testing.assert_close(values.flatten(), torch.tensor(single))


@pytest.mark.parametrize("t", [-1, 1000, 0.5, math.nan, math.inf])
def test_times_outside_the_process_are_refused(t: float) -> None:
    with pytest.raises(ValueError, match=f"t={t}.*0 to 999"):
        DDPM().level(t)


def test_a_schedule_or_length_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule='sqrt'.*'linear' or 'cosine'"):
        DDPM("sqrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_timesteps=20.*21 or more"):
        DDPM(num_timesteps=20)
    assert 0 < DDPM(num_timesteps=21).alphas_cumprod[-1] < DDPM(num_timesteps=21).betas[-1] < 1


# --- grids ----------------------------------------------------------------------------------------


def respaced_by_the_rule(num_timesteps: int, steps: int) -> list[int]:
    """round(i (T - 1) / (S - 1)) in exact arithmetic, halves to even."""
    return [round(Fraction(i * (num_timesteps - 1), steps - 1)) for i in range(steps)]


def test_published_step_counts_choose_the_times_of_the_rule() -> None:
    for steps in (2, 10, 25, 50, 100, 250, 500, 1000):
        assert respace(1000, steps) == respaced_by_the_rule(1000, steps)
    assert respace(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert respace(1000, 4) == [0, 333, 666, 999]
    assert respace(1000, 3) == [0, 500, 999]
    # An exact half, 499.5, which the accumulated stride of ADM reaches from below.
    assert respace(1000, 999)[499] == 499


def test_a_single_step_starts_from_noise() -> None:
    grid = DDPM().grid(1)
    assert grid == (DDPM().level(999), CLEAN)


@given(data=st.data(), num_timesteps=st.integers(21, 4000))
def test_any_grid_keeps_both_ends_and_repeats_nothing(
    data: st.DataObject, num_timesteps: int
) -> None:
    steps = data.draw(st.integers(2, num_timesteps))
    times = respace(num_timesteps, steps)
    assert (times[0], times[-1], len(times)) == (0, num_timesteps - 1, steps)
    assert all(a < b for a, b in itertools.pairwise(times))
    # Accumulating the stride may turn an exact half the other way, never more.
    rule = respaced_by_the_rule(num_timesteps, steps)
    assert max(abs(a - b) for a, b in zip(times, rule, strict=True)) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_start_in_noise_and_end_clean(schedule: str) -> None:
    process = DDPM(schedule)  # type: ignore[arg-type]
    grid = process.grid(50)
    assert len(grid) == 51
    assert grid[0] == process.level(999) and grid[-2] == process.level(0)
    assert grid[-1] == CLEAN
    assert [level.t for level in grid[:-1]] == respaced_by_the_rule(1000, 50)[::-1]
    sigmas = [level.sigma for level in grid]
    assert all(a > b for a, b in itertools.pairwise(sigmas))


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}.*1 to 1000"):
        DDPM().grid(steps)


def test_all_steps_of_a_process_are_possible() -> None:
    assert DDPM().max_steps == 1000
    assert [level.t for level in DDPM().grid(1000)[:-1]] == list(range(999, -1, -1))


# --- the posterior --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 50, 3, 2])
def test_posterior_is_bayes_rule(schedule: str, steps: int) -> None:
    """q(x_next | x_t, x_0) as a product of two Gaussians, which knows no beta tilde.

    x_next ~ N(a' x_0, s'^2) and x_t | x_next ~ N(r x_next, b), r = a / a', b = s^2 - r^2 s'^2:
    precision 1 / s'^2 + r^2 / b, mean (a' x_0 / s'^2 + r x_t / b) / precision.
    """
    grid = DDPM(schedule).grid(steps)  # type: ignore[arg-type]
    posterior = Posterior.of(grid)
    for i, (now, after) in enumerate(itertools.pairwise(grid[:-1])):
        r, b = bridge(now, after)
        precision = 1 / after.sigma**2 + r**2 / b
        assert posterior.of_x_0[i] == pytest.approx(after.alpha / after.sigma**2 / precision)
        assert posterior.of_x_t[i] == pytest.approx(r / b / precision)
        assert posterior.log_lower[i] == pytest.approx(-math.log(precision), abs=1e-8)
        assert posterior.log_upper[i] == pytest.approx(math.log(b), abs=1e-8)
        assert posterior.log_large[i] == posterior.log_upper[i]


def bridge(now: NoiseLevel, after: NoiseLevel) -> tuple[float, float]:
    """Ratio and variance of the forward step from ``after`` to ``now``."""
    r = float(now.alpha) / float(after.alpha)
    return r, float(now.sigma) ** 2 - r**2 * float(after.sigma) ** 2


@pytest.mark.parametrize("steps", [1000, 50, 2, 1])
def test_the_last_step_returns_x_0(steps: int) -> None:
    posterior = Posterior.of(DDPM().grid(steps))
    assert posterior.of_x_0[-1] == pytest.approx(1)
    assert posterior.of_x_t[-1] == pytest.approx(0)
    assert all(map(math.isfinite, posterior.log_lower + posterior.log_upper + posterior.log_large))


def test_the_last_step_borrows_the_variance_of_the_one_before() -> None:
    """As published: its own posterior variance is 0, whose logarithm no network could place."""
    posterior = Posterior.of(DDPM().grid(50))
    assert posterior.log_lower[-1] == posterior.log_lower[-2] == posterior.log_large[-1]
    assert posterior.log_upper[-1] == pytest.approx(math.log(1e-4))


def test_posterior_mean_moves_along_the_curve() -> None:
    """The mean given (x_t, x_0) is a' x_0 + (noise left) eps when x_t = a x_0 + s eps."""
    grid = DDPM().grid(20)
    posterior = Posterior.of(grid)
    for i, (now, after) in enumerate(itertools.pairwise(grid)):
        x_0_weight = posterior.of_x_0[i] + posterior.of_x_t[i] * now.alpha
        assert x_0_weight == pytest.approx(after.alpha)
