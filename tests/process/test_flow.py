"""The linear interpolant: levels, grids, shifts and both of its ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.process import Flow, NoiseLevel
from sag_dit.process.flow import shifted

SCALES = [1.0, 1000.0]


def normal(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=random)


@given(u=st.floats(0, 1), scale=st.sampled_from([1.0, 2.5, 1000.0]))
def test_a_level_is_on_the_line(u: float, scale: float) -> None:
    level = Flow(time_scale=scale).level(u * scale)
    assert level.t == u * scale
    assert level.alpha == pytest.approx(1 - u, abs=1e-12)
    assert level.sigma == pytest.approx(u, abs=1e-12)
    assert (level.d_alpha, level.d_sigma) == (-1, 1)
    assert level.alpha * level.d_sigma - level.sigma * level.d_alpha == pytest.approx(1)  # type: ignore[operator]


@pytest.mark.parametrize("scale", SCALES)
def test_levels_of_a_batch_are_those_of_each_image(scale: float) -> None:
    process = Flow(time_scale=scale)
    times = torch.tensor([0.0, 0.1, 0.5, 1.0]) * scale
    level = process.level(times)
    assert torch.equal(level.times(torch.zeros(4, 1, 2, 2)), times)
    x_0, eps = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    together = process.add_noise(x_0, eps, level)
    for i, t in enumerate(times.tolist()):
        alone = process.add_noise(x_0[i : i + 1], eps[i : i + 1], process.level(t))
        torch.testing.assert_close(together[i : i + 1], alone)
    assert torch.equal(together[0], x_0[0])
    assert torch.equal(together[-1], eps[-1])


def test_levels_keep_the_type_of_their_times() -> None:
    for dtype in (torch.float32, torch.float64):
        level = Flow().level(torch.tensor([0.3], dtype=dtype))
        assert isinstance(level.sigma, torch.Tensor) and level.sigma.dtype == dtype
        assert level.sigma.shape == (1, 1, 1, 1)
    whole = Flow(time_scale=1000).level(torch.tensor([250]))
    assert torch.equal(torch.as_tensor(whole.sigma), torch.full((1, 1, 1, 1), 0.25))


def test_the_velocity_is_eps_minus_x_0_and_where_the_line_leads() -> None:
    process = Flow()
    x_0, eps = normal(2, 1, 3, 4, 4)
    v = process.target(x_0, eps, process.level(0.4), "v")
    assert torch.equal(v, eps - x_0)
    here, there = (process.add_noise(x_0, eps, process.level(t)) for t in (0.4, 0.5))
    torch.testing.assert_close((there - here) / 0.1, v)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_v_is_read_at_both_ends_without_dividing(t: float) -> None:
    process = Flow()
    level = process.level(t)
    x_0, eps = normal(2, 2, 3, 4, 4)
    x_t = process.add_noise(x_0, eps, level)
    prediction = process.predict(x_t, level, eps - x_0, "v")
    torch.testing.assert_close(prediction.x_0, x_0)
    torch.testing.assert_close(prediction.eps, eps)
    if t > 0:
        clamped = prediction.clamped((-0.5, 0.5))
        torch.testing.assert_close(clamped.x_0, x_0.clamp(-0.5, 0.5))
        torch.testing.assert_close(process.add_noise(clamped.x_0, clamped.eps, level), x_t)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.1])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 10_000])
def test_a_grid_falls_from_noise_to_image(steps: int, shift: float, scale: float) -> None:
    process = Flow(time_scale=scale, shift=shift)
    grid = process.grid(steps)
    assert len(grid) == steps + 1
    assert (grid[0].t, grid[0].alpha, grid[0].sigma) == (scale, 0, 1)
    assert grid[-1] == NoiseLevel(t=0.0, alpha=1.0, sigma=0.0, d_alpha=-1.0, d_sigma=1.0)
    sigmas = [float(level.sigma) for level in grid]
    assert all(now > after for now, after in pairwise(sigmas))
    assert list(grid) == [process.level(float(level.t)) for level in grid]


def test_a_grid_is_uniform_unless_shifted() -> None:
    assert [level.t for level in Flow().grid(4)] == [1, 0.75, 0.5, 0.25, 0]
    assert [level.t for level in Flow(time_scale=1000).grid(4)] == [1000, 750, 500, 250, 0]
    # Stable Diffusion 3, equation 23, with 3 for the square root of the ratio of pixels.
    expected = [3 * u / (1 + 2 * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert [level.t for level in Flow(shift=3).grid(4)] == pytest.approx(expected)


@given(u=st.floats(1e-6, 1 - 1e-6), shift=st.floats(0.01, 100))
def test_a_shift_adds_its_logarithm_to_the_logit(u: float, shift: float) -> None:
    def logit(p: float) -> float:
        return math.log(p) - math.log1p(-p)

    assert logit(shifted(u, shift)) == pytest.approx(logit(u) + math.log(shift), abs=1e-6)
    assert shifted(0.0, shift) == 0 and shifted(1.0, shift) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_uniform_times_fill_the_process(scale: float) -> None:
    process = Flow(time_scale=scale, shift=3.0)
    u = torch.tensor([0.0, 0.25, 0.999])
    assert torch.equal(process.time_at(u), u * scale)
    process.level(float(process.time_at(torch.tensor(1 - 2**-24))))


@pytest.mark.parametrize("steps", [0, -3, 10_001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps}: expected .* from 1 to 10000"):
        Flow().grid(steps)


@pytest.mark.parametrize("t", [-0.001, 1.001, float("nan"), 500])
def test_times_that_do_not_exist(t: float) -> None:
    with pytest.raises(ValueError, match=rf"t={t}: expected .* 0 \(image\) to 1 \(noise\)"):
        Flow().level(t)
    with pytest.raises(ValueError, match=r"to 1000 \(noise\)"):
        Flow(time_scale=1000).level(1000.5)


@pytest.mark.parametrize("name", ["time_scale", "shift"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected a finite number above 0"):
        Flow(**{name: value})
