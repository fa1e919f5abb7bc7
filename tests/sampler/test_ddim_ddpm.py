"""DDIM and ancestral sampling against closed forms: the exact ODE, and Ho et al.'s posterior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, NoiseLevel, Prediction, Process, Step
from sag_dit.sampler import DDIM, Ancestral, Sampler
from sag_dit.sampler.ddpm import Variance
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.sampler.oracle import Gaussian, Recorder, noise_of, run, start

SAMPLERS: list[Sampler] = [DDIM(), DDIM(eta=1.0), Ancestral()]
WIDE = 64
WIDE_DATA = Gaussian(Gaussian().mean * WIDE, Gaussian().std * WIDE)
SHORT = DDPM(num_timesteps=50)


class Straight(Process):
    """A process that is not variance preserving: x_t = (1 - t) x_0 + t eps."""

    max_steps = 100

    def level(self, t: float | Tensor) -> NoiseLevel:
        return NoiseLevel(t=t, alpha=1 - t, sigma=t, d_alpha=-1.0, d_sigma=1.0)

    def time_at(self, u: Tensor) -> Tensor:
        return u

    def grid(self, steps: int) -> tuple[NoiseLevel, ...]:
        return tuple(self.level(1 - i / steps) for i in range(steps + 1))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_comes_to_the_exact_ode(schedule: str) -> None:
    data, x, process = Gaussian(), start(), DDPM(schedule)
    errors = [
        float((run(DDIM(), Recorder(data.predict), x, process, steps)[-1].x - exact).abs().max())
        for steps in (20, 80, 320)
        for exact in [data.end(x, process.level(999))]
    ]
    # A first-order method: four times the steps, a quarter of the error.
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 0.02


@pytest.mark.parametrize("sampler", [DDIM(0.5), DDIM(1.0), Ancestral("fixed_small"), Ancestral()])
def test_noise_comes_to_the_data_distribution(sampler: Sampler) -> None:
    mean, std = torch.tensor(WIDE_DATA.mean), torch.tensor(WIDE_DATA.std)
    errors = []
    for steps in (50, 250):
        x = start(1, (256, 4 * WIDE))
        x = run(sampler, Recorder(WIDE_DATA.predict), x, DDPM(), steps)[-1].x
        z = ((x - mean) / std).reshape(256, WIDE, 4).double()
        assert z.mean((0, 1)).abs().max() < 0.03
        errors.append(float((z.std((0, 1)) - 1).abs().max()))
    assert errors[1] < max(errors[0] / 2, 0.02)
    assert errors[1] < 0.15


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("x_0_range", [None, (-1.0, 1.0)])
def test_ddim_with_eta_1_is_ancestral_sampling(
    schedule: str, x_0_range: tuple[float, float] | None
) -> None:
    data = Gaussian((1.2, -0.9, 0.1, 0.4))
    ours, ancestral = (
        run(sampler, Recorder(data.predict), start(), DDPM(schedule), 25, x_0_range)
        for sampler in (DDIM(eta=1.0), Ancestral("fixed_small"))
    )
    for one, other in zip(ours, ancestral, strict=True):
        torch.testing.assert_close(one.x, other.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variance", "learned"),
    [
        ("auto", False),
        ("auto", True),
        ("learned", True),
        ("fixed_small", False),
        ("fixed_large", True),
    ],
)
@pytest.mark.parametrize("x_0_range", [None, (-0.5, 0.5)])
def test_ancestral_steps_are_ho_et_als(
    variance: Variance, learned: bool, x_0_range: tuple[float, float] | None
) -> None:
    """Equations 6 and 7 there, from the betas of a grid that leaves out no time."""
    beta = SHORT.betas
    alpha_bar = np.cumprod(1 - beta)
    fraction = torch.linspace(-0.1, 1.1, 16).reshape(1, 1, 4, 4)

    def answer(x_t: Tensor, level: NoiseLevel) -> Prediction:
        prediction = Gaussian().predict(x_t, level)
        return replace(prediction, variance_fraction=fraction if learned else None)

    denoise = Recorder(answer)
    taken = run(Ancestral(variance), denoise, start(), SHORT, 50, x_0_range)
    for (x_t, step), after in zip(denoise.asked, taken, strict=True):
        t = 49 - step.index
        assert step.level.t == t
        x_0 = after.prediction.x_0
        if x_0_range:
            x_0 = x_0.clamp(*x_0_range)
        before = alpha_bar[t - 1] if t else 1.0
        mean = before**0.5 * beta[t] / (1 - alpha_bar[t]) * x_0
        mean += (1 - beta[t]) ** 0.5 * (1 - before) / (1 - alpha_bar[t]) * x_t
        if t == 0:
            torch.testing.assert_close(after.x, mean)
            continue
        small, large = beta[t] * (1 - before) / (1 - alpha_bar[t]), beta[t]
        spread = torch.tensor(large if variance != "fixed_small" else small).sqrt()
        if learned and variance in ("auto", "learned"):
            spread = large ** (fraction / 2) * small ** ((1 - fraction) / 2)
        expected = mean + spread * noise_of(6).normal(step.index + 1, (1, 4, 4))
        torch.testing.assert_close(after.x, expected.float(), rtol=1e-5, atol=1e-5)


def test_ddim_clamps_x_0_and_takes_the_eps_that_explains_x_t() -> None:
    outside = Gaussian((1.5, -2.0, 0.1, 0.9))
    denoise = Recorder(outside.predict)
    for after in run(DDIM(), denoise, start(), DDPM(), 10, (-1.0, 1.0)):
        x_t, step = denoise.asked[after.step.index]
        x_0 = after.prediction.x_0.clamp(-1, 1)
        eps = (x_t - step.level.alpha * x_0) / step.level.sigma
        expected = step.next.alpha * x_0 + step.next.sigma * eps
        torch.testing.assert_close(after.x, expected, rtol=1e-5, atol=1e-5)
    assert after.x.abs().max() == 1
    assert after.prediction.x_0.abs().max() > 1


def test_ddim_draws_no_noise() -> None:
    class Silent(NoiseSource):
        def normal(self, *_: object) -> Tensor:
            raise AssertionError("noise was drawn")

    silent = Silent([0], [0])
    assert len(list(DDIM().steps(Recorder(Gaussian().predict), start(1), DDPM(), 5, silent))) == 5
    with pytest.raises(AssertionError, match="noise was drawn"):
        list(DDIM(0.1).steps(Recorder(Gaussian().predict), start(1), DDPM(), 5, silent))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_those_of_the_grid(sampler: Sampler) -> None:
    denoise = Recorder(Gaussian().predict)
    taken = run(sampler, denoise, start(), DDPM(), 7)
    grid = DDPM().grid(7)
    expected = [Step(i, 7, grid[i], grid[i + 1]) for i in range(7)]
    assert [each.step for each in taken] == expected
    assert [step for _, step in denoise.asked] == expected
    torch.testing.assert_close(taken[-1].x, taken[-1].prediction.x_0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_computed_before_it_is_asked_for(sampler: Sampler) -> None:
    denoise = Recorder(Gaussian().predict)
    steps = sampler.steps(denoise, start(), DDPM(), 1000, noise_of(6))
    assert denoise.asked == []
    next(steps)
    next(steps)
    assert len(denoise.asked) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    def images(indices: list[int]) -> Tensor:
        noise = NoiseSource([7] * len(indices), indices)
        x = noise.normal(0, (1, 4, 4))
        return list(sampler.steps(Recorder(Gaussian().predict), x, DDPM(), 10, noise))[-1].x

    assert torch.equal(images([3, 8, 1]), torch.cat([images([3]), images([1, 8]).flip(0)]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(sampler: Sampler, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps}: expected .* from 1 to 1000"):
        run(sampler, Recorder(Gaussian().predict), start(), DDPM(), steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_returns_the_expected_image(sampler: Sampler) -> None:
    (only,) = run(sampler, Recorder(Gaussian().predict), start(), DDPM(), 1)
    assert only.step.level == DDPM().grid(1)[0]
    torch.testing.assert_close(only.x, only.prediction.x_0)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [(DDIM(), "ddim"), (Ancestral(), "ddpm"), (DiffusersSampler("euler"), "euler")],
)
def test_other_processes_are_refused(sampler: Sampler, name: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler={name}: .* process is Straight"):
        run(sampler, Recorder(Gaussian().predict), start(), Straight(), 10)


@pytest.mark.parametrize("eta", [-0.1, 1.01, float("nan")])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta={eta}: expected 0"):
        DDIM(eta=eta)


def test_unknown_variance() -> None:
    with pytest.raises(ValueError, match="variance='fixed': expected auto, learned"):
        Ancestral("fixed")  # type: ignore[arg-type]


def test_a_learned_variance_must_be_predicted() -> None:
    with pytest.raises(ValueError, match="variance='learned': this network predicts no variance"):
        run(Ancestral("learned"), Recorder(Gaussian().predict), start(), DDPM(), 10)
