"""A closed-form ideal denoiser as oracle: predictions, guidance and whole trajectories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.guidance import CFG, BlurGuidance, GuidedDenoiser
from sag_dit.noise import START, NoiseSource
from sag_dit.process import DDPM, Step
from sag_dit.sampler import DDIM, Ancestral, Sampler
from tests.properties.ideal import Ideal

MEAN, SPREAD = 0.6, 0.3


def step_at(t: int) -> Step:
    process = DDPM()
    return Step(0, 1, process.level(t), process.grid(1)[-1])


@given(t=st.integers(0, 999), value=st.floats(-3, 3))
def test_x_0_of_one_gaussian_is_its_posterior_mean(t: int, value: float) -> None:
    """E[x_0 | x_t] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m)."""
    ideal = Ideal([MEAN], SPREAD, (1, 1, 1))
    level = ideal.process.level(t)
    x_t = torch.full((1, 1, 1, 1), value, dtype=torch.float64)
    gain = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)  # type: ignore[operator]
    expected = MEAN + gain * (x_t - level.alpha * MEAN)
    prediction = ideal(x_t, level, torch.tensor([0]))
    torch.testing.assert_close(prediction.x_0, expected, rtol=1e-9, atol=1e-9)


@given(t=st.integers(0, 999), scale=st.floats(0, 8), seed=st.integers(0, 100))
@settings(max_examples=50)
def test_cfg_follows_the_sharpened_density(t: int, scale: float, seed: int) -> None:
    """Guided eps = -sigma grad [log p(x) + w (log p(x|y) - log p(x))]."""
    ideal = Ideal([-1.0, 0.2, 0.9], SPREAD, (1, 2, 2))
    random = torch.Generator().manual_seed(seed)
    x_t = torch.randn(3, 1, 2, 2, generator=random, dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 1, 2])
    null, cond = (ideal.log_density(x_t, t, labels).sum() for labels in (ideal.null(3), y))
    (gradient,) = torch.autograd.grad(null + scale * (cond - null), x_t)
    guided = GuidedDenoiser(ideal, [CFG(scale)])(x_t.detach(), step_at(t), y)
    expected = -step_at(t).level.sigma * gradient
    torch.testing.assert_close(guided.eps, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_blur_guidance_leaves_flat_images_alone(t: int) -> None:
    """Where nothing can be blurred away there is nothing to guide towards."""
    ideal = Ideal([MEAN], SPREAD, (3, 8, 8))
    flat = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3, 1, 1).expand(2, 3, 8, 8)
    y = torch.zeros(2, dtype=torch.long)
    plain = ideal(flat, step_at(t).level, y)
    guided = GuidedDenoiser(ideal, [BlurGuidance(5.0)])(flat, step_at(t), y)
    torch.testing.assert_close(guided.v, plain.v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [100, 500, 900])
def test_blur_guidance_sharpens(t: int) -> None:
    """Beside an ideal denoiser it adds to x_0 what a blur takes away, as far as x_t knows of it."""
    ideal = Ideal([0.0], 1.0, (1, 8, 8))
    random = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, 8, 8, generator=random, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.long)
    term = BlurGuidance(1.0)
    plain = ideal(x_t, step_at(t).level, y)
    guided = GuidedDenoiser(ideal, [term])(x_t, step_at(t), y)
    # eps is linear in x_t here with gain sigma, and x_bar differs from x_t by -alpha detail.
    level = step_at(t).level
    detail = plain.x_0 - term.blurred(plain.x_0)
    expected = level.sigma * level.alpha * detail
    torch.testing.assert_close(guided.eps - plain.eps, expected, rtol=1e-5, atol=1e-8)


def drawn(ideal: Ideal, sampler: Sampler, steps: int, count: int) -> tuple[Tensor, Tensor]:
    """Starting noise and final images of class 0."""
    noise = NoiseSource([0] * count, range(count))
    x_T = noise.normal(START, ideal.latent_shape).double()
    guided = GuidedDenoiser(ideal)
    y = torch.zeros(count, dtype=torch.long)
    x = x_T
    for each in sampler.steps(
        lambda x_t, step: guided(x_t, step, y), x_T, ideal.process, steps, noise
    ):
        x = each.x
    return x_T, x


def test_ddim_converges_to_the_exact_flow() -> None:
    """Along the exact flow of one Gaussian (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays."""
    ideal = Ideal([MEAN], SPREAD, (1, 4, 4))
    start = ideal.process.level(999)
    errors = []
    for steps in (50, 200, 800):
        x_T, x = drawn(ideal, DDIM(), steps, 8)
        spread = (start.alpha**2 * SPREAD**2 + start.sigma**2) ** 0.5  # type: ignore[operator]
        exact = MEAN + SPREAD * (x_T - start.alpha * MEAN) / spread
        errors.append((x - exact).abs().mean().item())
    assert errors[-1] < 2e-3
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize(
    "sampler", [Ancestral("fixed_small"), Ancestral("fixed_large"), DDIM(eta=1.0), DDIM()], ids=str
)
def test_samples_have_the_distribution_of_the_data(sampler: Sampler) -> None:
    """4,096 numbers: their mean to five standard errors, their spread to as much and a bias."""
    ideal = Ideal([MEAN], SPREAD, (1, 16, 16))
    _, x = drawn(ideal, sampler, 250, 16)
    n = x.numel()
    assert abs(x.mean() - MEAN) < 5 * SPREAD / n**0.5
    assert abs(x.std() / SPREAD - 1) < 5 / (2 * n) ** 0.5 + 0.03


def test_classes_are_drawn_apart() -> None:
    """Of two distant classes the one that is asked for comes out, guided or not."""
    ideal = Ideal([-1.0, 1.0], 0.1, (1, 2, 2))
    noise = NoiseSource([0] * 8, range(8))
    y = torch.tensor([0, 1] * 4)
    for scale in (1.0, 2.0):
        guided = GuidedDenoiser(ideal, [CFG(scale)])
        x = noise.normal(START, (1, 2, 2)).double()
        for each in DDIM().steps(
            lambda x_t, step, guided=guided: guided(x_t, step, y), x, ideal.process, 50, noise
        ):
            x = each.x
        means = x.flatten(1).mean(dim=1)
        assert ((means > 0) == (y == 1)).all()
        assert (means.abs() - 1).abs().max() < 0.2
