"""The proof of every scheduler that the adapter offers, and the refusal of all others."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
import torch
from _pytest.mark import ParameterSet
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from sag_dit.attention import Capture
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG, GuidedDenoiser
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, NoiseLevel, Prediction
from sag_dit.sampler import DDIM, Ancestral, Sampler
from sag_dit.sampler.diffusers import PROVEN, REFUSED, DiffusersSampler
from tests.closeness import assert_near
from tests.sampler.by_hand import by_hand
from tests.sampler.oracle import Gaussian, Recorder, noise_of, run, start

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sampler"
NAMES = list(PROVEN)
STOCHASTIC = [name for name in NAMES if PROVEN[name].stochastic]
DETERMINISTIC = [name for name in NAMES if not PROVEN[name].stochastic]
TWICE = ("heun", "heun_karras", "kdpm2", "kdpm2_ancestral")
WIDE = 64
WIDE_DATA = Gaussian(Gaussian().mean * WIDE, Gaussian().std * WIDE)


def on(names: list[str]) -> list[tuple[str, str]]:
    """Each name with every schedule on which its convergence is proven.

    On the scaled linear one the last step, from the noise that t = 0 has there, sets the error.
    """
    return [
        (name, schedule)
        for name in names
        for schedule in PROVEN[name].schedules
        if schedule != "scaled_linear"
    ]


def with_scaled(names: list[str]) -> list[ParameterSet]:
    """The same with the scaled linear schedule, which lies near the linear one."""
    slow = [pytest.param(name, "scaled_linear", marks=pytest.mark.slow) for name in names]
    return [*(pytest.param(*each) for each in on(names)), *slow]


@pytest.mark.parametrize(("name", "schedule"), on(DETERMINISTIC))
def test_more_steps_come_closer_to_the_exact_ode(name: str, schedule: str) -> None:
    data, errors = Gaussian(), []
    for steps in (20, 100):
        denoise = Recorder(data.predict)
        last = run(DiffusersSampler(name), denoise, start(), DDPM(schedule), steps)[-1]
        x_t, first = denoise.asked[0]
        errors.append(float((last.x - data.end(x_t, first.level)).abs().max()))
    assert errors[1] < max(errors[0] / 3, 2e-3)
    assert errors[1] < 0.12


@pytest.mark.parametrize(("name", "schedule"), on(STOCHASTIC))
def test_more_steps_come_closer_to_the_data_distribution(name: str, schedule: str) -> None:
    mean, std = torch.tensor(WIDE_DATA.mean), torch.tensor(WIDE_DATA.std)
    errors = []
    for steps in (40, 160):
        denoise = Recorder(WIDE_DATA.predict)
        x = start(1, (256, 4 * WIDE))
        x = run(DiffusersSampler(name), denoise, x, DDPM(schedule), steps)[-1].x
        z = ((x - mean) / std).reshape(256, WIDE, 4).double()
        assert z.mean((0, 1)).abs().max() < 0.03
        errors.append(float((z.std((0, 1)) - 1).abs().max()))
    assert errors[1] < max(errors[0] / 2, 0.02)
    assert errors[1] < 0.15


@pytest.mark.parametrize(("name", "schedule"), with_scaled(NAMES))
def test_every_level_is_where_the_image_is(name: str, schedule: str) -> None:
    """All data is one image, whose eps never changes: x_t tells the level it is really at."""
    data = Gaussian(Gaussian().mean * WIDE, (0.0,) * 4 * WIDE)
    denoise = Recorder(data.predict)
    x = start(1, (128, 4 * WIDE))
    taken = run(DiffusersSampler(name), denoise, x, DDPM(schedule), 20)
    eps = [data.standardised(x_t, step.level) for x_t, step in denoise.asked]
    # diffusers computes in single precision, from a noise-to-signal ratio of 157 or 20,000 down.
    rounding = 5e-2 if schedule == "cosine" else 1e-4
    for (_, step), later in zip(denoise.asked, eps, strict=True):
        if PROVEN[name].stochastic:
            assert abs(float(later.std()) - 1) < 0.02
        else:
            assert step.level.sigma * (later - eps[0]).abs().max() < rounding
    for (x_t, _), before in zip(denoise.asked[1:], taken, strict=False):
        torch.testing.assert_close(x_t, before.x)
    torch.testing.assert_close(taken[-1].x[0, 0, 0], torch.tensor(data.mean), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "schedule"), with_scaled(NAMES))
def test_the_time_told_is_that_of_the_level(name: str, schedule: str) -> None:
    process = DDPM(schedule)
    denoise = Recorder(Gaussian().predict)
    run(DiffusersSampler(name), denoise, start(1), process, 20)
    noisiest = process.level(process.num_timesteps - 1)
    assert denoise.asked[0][1].level.alpha == pytest.approx(noisiest.alpha, rel=1e-4)
    for _, step in denoise.asked:
        t, level = step.level.t, step.level
        low, high = (process.level(whole(t)) for whole in (math.floor, math.ceil))
        # diffusers' table is in single precision, which shows in 1 - alpha^2 at t = 0.
        assert low.sigma * 0.999 <= level.sigma <= high.sigma * 1.001
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)
        assert (level.d_alpha, level.d_sigma) == (-level.sigma, level.alpha)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_numbered_and_joined(name: str) -> None:
    steps = 10
    denoise = Recorder(Gaussian().predict)
    taken = [each.step for each in run(DiffusersSampler(name), denoise, start(1), DDPM(), steps)]
    count = 2 * steps - 1 if name in TWICE else steps + (name == "pndm")
    assert [step.index for step in taken] == list(range(count))
    assert {step.count for step in taken} == {count}
    assert taken == [step for _, step in denoise.asked]
    assert [step.next for step in taken[:-1]] == [step.level for step in taken[1:]]
    assert (taken[-1].next.alpha, taken[-1].next.sigma) == (1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_diffusers_own_loop(name: str) -> None:
    def eps(x_t: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        return torch.tanh(x_t + math.sin(t / 150))

    def denoise(x_t: Tensor, level: NoiseLevel) -> Prediction:
        return DDPM().predict(x_t, level, eps(x_t, level.t, 0, 0), "eps")

    ours = run(DiffusersSampler(name), Recorder(denoise), start(), DDPM(), 20)[-1].x
    theirs = by_hand(name, eps, start(), 20, noise_of(6))
    assert_near(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_self_attention_guidance_is_the_papers(name: str, denoiser: ClassConditional) -> None:
    """eps + s (eps - eps_bar) in diffusers' own loop, against SAG under the adapter."""
    labels, scale, layer = torch.tensor([1, 5]), 0.8, denoiser.layer("auto")

    def eps(x_t: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
        level = NoiseLevel(t, alpha, sigma, -sigma, alpha)
        seen = denoiser(x_t, level, labels, [Capture(layer, kind="map", key="map")])
        saliency = seen.attention["map"].mean(1).sum(1).reshape(2, 1, *layer.grid)
        mask = (saliency > 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert 0 < mask.float().mean() < 1
        clean = denoiser.network(x_t, level.times(x_t), labels)[:, :4]
        x_0 = (x_t - sigma * clean) / alpha
        x_bar = alpha * torch.where(mask, gaussian_blur(x_0, [9, 9], [1.0, 1.0]), x_0)
        x_bar = x_bar + sigma * clean
        worse = denoiser.network(x_bar, level.times(x_t), labels)[:, :4]
        return clean + scale * (clean - worse)

    noise = noise_of(2)
    x = noise.normal(0, denoiser.latent_shape)
    guided = GuidedDenoiser(denoiser, [SAG(scale=scale)])
    sampler = DiffusersSampler(name)
    steps = sampler.steps(lambda x_t, step: guided(x_t, step, labels), x, DDPM(), 10, noise)
    ours = [each.x for each in steps][-1]
    theirs = by_hand(name, eps, x, 10, noise)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    """Nor on what else the same sampler draws meanwhile: each run has a scheduler of its own."""
    data = Gaussian()
    sampler = DiffusersSampler(name)

    def steps_for(indices: list[int]) -> list[Tensor]:
        noise = NoiseSource([7] * len(indices), indices)
        return [
            sampler.steps(Recorder(data.predict), noise.normal(0, (1, 4, 4)), DDPM(), 10, noise)
        ]

    (together,), (alone,), (others,) = steps_for([3, 8, 1]), steps_for([8]), steps_for([1, 3])
    for three, one, two in zip(together, alone, others, strict=True):
        assert torch.equal(three.x, torch.cat([two.x[1:], one.x, two.x[:1]]))
    again = NoiseSource([8], [8])
    x = NoiseSource([7], [8]).normal(0, (1, 4, 4))
    other = list(sampler.steps(Recorder(data.predict), x, DDPM(), 10, again))[-1].x
    assert torch.equal(other, one.x) is not PROVEN[name].stochastic


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_clean_image_is_clamped(name: str) -> None:
    """Data of one image outside the range: every step expects its nearest point inside."""
    outside = Gaussian((2.0, -3.0, 0.5, -0.5), (0.0,) * 4)
    denoise = Recorder(outside.predict)
    taken = run(DiffusersSampler(name), denoise, start(), DDPM(), 10, (-1.0, 1.0))
    wanted = torch.tensor([1.0, -1.0, 0.5, -0.5]).expand(6, 1, 4, 4)
    torch.testing.assert_close(taken[-1].x, wanted, rtol=0, atol=1e-4)
    assert taken[0].prediction.x_0.min() < -2.9


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    denoise = Recorder(Gaussian().predict)
    steps = DiffusersSampler("euler").steps(denoise, start(), DDPM(), 10, noise_of(6))
    assert denoise.asked == []
    next(steps)
    assert len(denoise.asked) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if PROVEN[name].least == 1])
def test_one_step_takes_the_noisiest_level_to_the_expected_image(name: str) -> None:
    denoise = Recorder(Gaussian().predict)
    (only,) = run(DiffusersSampler(name), denoise, start(), DDPM(), 1)
    assert only.step.level.t == pytest.approx(999, abs=1e-3)
    said = only.prediction  # its x_0 is what is left of x_t / alpha
    assert_near(only.x, said.x_0, 1e-6, scale=said.x_t / said.level.alpha)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc", "euler"])
def test_as_many_steps_as_the_process_has(name: str) -> None:
    process = DDPM(num_timesteps=50)
    denoise = Recorder(Gaussian().predict)
    last = run(DiffusersSampler(name), denoise, start(), process, 50)[-1]
    assert [step.level.t for _, step in denoise.asked] == list(range(49, -1, -1))
    assert last.x.isfinite().all()


def test_times_that_repeat_when_rounded_do_not_mislead() -> None:
    """Many karras steps share a time in diffusers, which then looks up the wrong first step."""
    data, denoise = Gaussian(), Recorder(Gaussian().predict)
    last = run(DiffusersSampler("dpmpp_2m_karras"), denoise, start(), DDPM(), 1000)[-1]
    times = [step.level.t for _, step in denoise.asked]
    assert times == sorted(set(times), reverse=True)
    x_t, first = denoise.asked[0]
    assert (last.x - data.end(x_t, first.level)).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "message"),
    [
        ("euler", "linear", 0, r"steps=0: expected a whole number from 1 to 1000"),
        ("unipc", "linear", 1001, r"steps=1001: expected a whole number from 1 to 1000"),
        ("dpmpp_2s", "linear", 1000, r"steps=1000: .* dpmpp_2s .* use 999 steps"),
        ("heun", "linear", 4, r"steps=4: heun overshoots .* expected 5 or more"),
        ("pndm", "linear", 30, r"steps=30: pndm .* divisor of 1000; nearest are 25 and 40"),
        ("heun", "cosine", 20, r"sampler=heun: not proven on the cosine schedule"),
    ],
)
def test_steps_that_are_not_proven(name: str, schedule: str, steps: int, message: str) -> None:
    denoise = Recorder(Gaussian().predict)
    with pytest.raises(ValueError, match=message):
        run(DiffusersSampler(name), denoise, start(), DDPM(schedule), steps)
    assert denoise.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPMSolverMultistepScheduler", "expected a short name, here dpmpp_2m or dpmpp_2m_karras"),
        ("HeunDiscreteScheduler", "expected a short name, here heun or heun_karras"),
        ("DDIMScheduler", "this package has its own, sampler=ddim"),
        ("ddpm", "this package has its own, sampler=ddpm"),
        ("deis", "not clean"),
        ("DEISMultistepScheduler", "not clean"),
        ("SASolverScheduler", "not clean"),
        ("IPNDMScheduler", "ignores the model's"),
        ("DPMSolverSDEScheduler", "Brownian"),
        ("LCMScheduler", "distilled"),
        ("FlowMatchEulerDiscreteScheduler", "its own, sampler=euler_flow"),
        ("EDMEulerScheduler", "another process"),
        ("dpmpp2m", "did you mean dpmpp_2m?"),
        ("Euler A", "did you mean euler"),
        ("uni_pc", "did you mean unipc?"),
        ("", "unknown or not proven; proven are"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DiffusersSampler(name)
    assert f"proven are {', '.join(PROVEN)}" in str(caught.value)


def test_every_other_scheduler_of_diffusers_is_refused() -> None:
    classes = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    assert len(classes) > 40
    for name in [*classes, *REFUSED]:
        with pytest.raises(ValueError, match="proven are"):
            DiffusersSampler(name)


def test_every_sampler_has_its_config() -> None:
    found = {
        path.stem: instantiate(OmegaConf.load(path))
        for path in CONFIGS.glob("*.yaml")
        if path.stem != "auto"
    }
    assert all(isinstance(sampler, Sampler) for sampler in found.values())
    ours = {name: each for name, each in found.items() if isinstance(each, DiffusersSampler)}
    assert ours == {name: DiffusersSampler(name) for name in PROVEN}
    assert found["ddim"] == DDIM(eta=0.0)
    assert found["ddpm"] == Ancestral(variance="auto")
