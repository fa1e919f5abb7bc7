"""NoiseLevel, Prediction and the conversions that hold on any curve (alpha, sigma)."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.process import DDPM, NoiseLevel, Prediction, Step
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import CLEAN


def vp_level(angle: float) -> NoiseLevel:
    """A level of any variance-preserving process: alpha = cos, sigma = sin."""
    alpha, sigma = math.cos(angle), math.sin(angle)
    return NoiseLevel(t=angle, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)


def flow_level(t: float) -> NoiseLevel:
    """A level of the linear interpolant, from image (0) to noise (1)."""
    return NoiseLevel(t=t, alpha=1 - t, sigma=t, d_alpha=-1.0, d_sigma=1.0)


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(2, 2, 3, 4, 4, generator=random, dtype=torch.float64)
    return x_0, eps


levels = st.one_of(
    st.floats(0, math.pi / 2).map(vp_level),
    st.floats(0, 1).map(flow_level),
    st.sampled_from([vp_level(0), vp_level(math.pi / 2), flow_level(0), flow_level(1), CLEAN]),
)


@given(level=levels, seed=st.integers(0, 100))
def test_v_holds_x_0_and_eps_at_every_level(level: NoiseLevel, seed: int) -> None:
    """Both come back from x_t and v without a division, at either end of either curve too."""
    x_0, eps = images(seed)
    x_t = DDPM().add_noise(x_0, eps, level)
    v = DDPM().target(x_0, eps, level, "v")
    prediction = DDPM().predict(x_t, level, v, "v")
    torch.testing.assert_close(prediction.x_0, x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
@pytest.mark.parametrize("level", [vp_level(0.7), flow_level(0.3)], ids=["vp", "flow"])
def test_target_and_predict_are_inverse(level: NoiseLevel, kind: OutputKind) -> None:
    x_0, eps = images()
    process = DDPM()
    x_t = process.add_noise(x_0, eps, level)
    prediction = process.predict(x_t, level, process.target(x_0, eps, level, kind), kind)
    torch.testing.assert_close(prediction.x_0, x_0)
    torch.testing.assert_close(prediction.eps, eps)
    assert prediction.x_t is x_t and prediction.level is level


def test_targets_by_hand() -> None:
    x_0, eps = images()
    level = flow_level(0.25)
    process = DDPM()
    assert torch.equal(process.target(x_0, eps, level, "eps"), eps)
    assert torch.equal(process.target(x_0, eps, level, "x_0"), x_0)
    assert torch.equal(process.target(x_0, eps, level, "v"), eps - x_0)
    torch.testing.assert_close(process.add_noise(x_0, eps, level), 0.75 * x_0 + 0.25 * eps)


def test_an_unknown_kind_is_refused() -> None:
    """A misspelt kind must not be read as some other one."""
    x_0, eps = images()
    with pytest.raises(ValueError, match=r"epsilon.*eps.*v.*x_0"):
        DDPM().predict(x_0, vp_level(0.5), eps, "epsilon")  # type: ignore[arg-type]


def test_clamping_explains_the_same_x_t() -> None:
    x_0, eps = images()
    for level in (vp_level(0.5), flow_level(0.5)):
        process = DDPM()
        x_t = process.add_noise(2 * x_0, eps, level)
        whole = process.predict(x_t, level, process.target(2 * x_0, eps, level, "v"), "v")
        clamped = whole.clamped((-1.0, 0.5))
        torch.testing.assert_close(clamped.x_0, (2 * x_0).clamp(-1, 0.5))
        again = process.add_noise(clamped.x_0, clamped.eps, level)
        torch.testing.assert_close(again, x_t)
        assert whole.clamped(None) is whole


def test_rows_cut_everything_but_attention() -> None:
    x_t = torch.arange(4.0).reshape(4, 1, 1, 1)
    whole = Prediction(x_t, vp_level(0.5), 10 * x_t, 100 * x_t, 1000 * x_t, {"layer": x_t})
    part = whole.rows(1, 3)
    assert part.x_t.flatten().tolist() == [1, 2]
    assert part.v.flatten().tolist() == [10, 20]
    assert part.variance_fraction is not None
    assert part.variance_fraction.flatten().tolist() == [100, 200]
    assert part.unclamped is not None
    assert part.unclamped.flatten().tolist() == [1000, 2000]
    assert part.attention == {}
    bare = Prediction(x_t, vp_level(0.5), x_t).rows(0, 1)
    assert bare.variance_fraction is None and bare.unclamped is None


def test_what_is_not_clamped_is_added_after() -> None:
    x_t = torch.linspace(-2.0, 2.0, 8).reshape(8, 1, 1, 1)
    level, shift = vp_level(0.5), torch.full_like(x_t, 0.3)
    plain = Prediction(x_t, level, torch.zeros_like(x_t)).clamped((-1.0, 1.0))
    shifted = Prediction(x_t, level, shift, unclamped=shift).clamped((-1.0, 1.0))
    torch.testing.assert_close(shifted.v, plain.v + shift)
    torch.testing.assert_close(shifted.x_0, plain.x_0 - level.sigma * shift)


def test_predictions_and_levels_are_immutable() -> None:
    x_t = torch.zeros(1, 1, 1, 1)
    with pytest.raises(FrozenInstanceError):
        Prediction(x_t, vp_level(0.5), x_t).v = x_t  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        vp_level(0.5).alpha = 1.0  # type: ignore[misc]


def test_times_of_a_batch() -> None:
    """Whole times are integers, as the published samplers pass them; others stay fractional."""
    x_t = torch.zeros(3, 1, 1, 1)
    whole = DDPM().level(7).times(x_t)
    assert whole.tolist() == [7, 7, 7] and whole.dtype == torch.int64
    fractional = vp_level(0.25).times(x_t)
    assert fractional.tolist() == [0.25] * 3 and fractional.dtype == torch.float32
    each = torch.tensor([1, 2, 3])
    assert torch.equal(DDPM().level(each).times(x_t), each)


def test_progress_starts_at_0_and_stays_below_1() -> None:
    grid = DDPM().grid(4)
    progress = [Step(i, 4, grid[i], grid[i + 1]).progress for i in range(4)]
    assert progress == [0, 0.25, 0.5, 0.75]
