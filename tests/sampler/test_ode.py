"""Euler and Heun on a flow: their orders against the exact ODE, their steps, clamping, guidance."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG, BlurGuidance, GuidedDenoiser, Term
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, NoiseLevel, Prediction, Process, Step
from sag_dit.sampler import DDIM, Ancestral, EulerFlow, HeunFlow, Sampler
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.closeness import assert_near
from tests.conftest import MakeDiT
from tests.sampler.oracle import Gaussian, Recorder, noise_of, run, start

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sampler"
BOTH: list[Sampler] = [EulerFlow(), HeunFlow()]
DATA = Gaussian()


def order(sampler: Sampler, process: Process, steps: tuple[int, int]) -> tuple[float, float]:
    """The order of convergence between two numbers of steps, and the error of the second."""
    x = start().double()
    exact = DATA.end(x, process.grid(1)[0])
    errors = []
    for count in steps:
        taken = run(sampler, Recorder(DATA.predict), x, process, count)
        errors.append(float((taken[-1].x - exact).abs().mean()))
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0]), errors[1]


@pytest.mark.parametrize("process", [Flow(), Flow(time_scale=1000), Flow(shift=2.0)], ids=str)
def test_euler_converges_in_the_first_order(process: Flow) -> None:
    found, error = order(EulerFlow(), process, (200, 800))
    assert 0.9 < found < 1.1
    assert error < 2e-3


@pytest.mark.parametrize("process", [Flow(), Flow(time_scale=1000), Flow(shift=2.0)], ids=str)
def test_heun_converges_in_the_second_order(process: Flow) -> None:
    found, error = order(HeunFlow(), process, (200, 800))
    assert 1.85 < found < 2.15
    assert error < 2e-5


def test_heun_is_more_exact_than_euler_at_the_same_cost() -> None:
    x, process = start().double(), Flow()
    exact = DATA.end(x, process.grid(1)[0])
    errors, asked = [], []
    for sampler, steps in ((EulerFlow(), 99), (HeunFlow(), 50)):
        denoise = Recorder(DATA.predict)
        errors.append((run(sampler, denoise, x, process, steps)[-1].x - exact).abs().mean())
        asked.append(len(denoise.asked))
    assert asked == [99, 99]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("sampler", BOTH)
def test_one_image_is_reached_at_once(sampler: Sampler) -> None:
    """All data is one image: the line is straight and every solver is exact, whatever the steps."""
    data = Gaussian(std=(0.0,) * 4)
    for steps in (1, 2, 5):
        x = run(sampler, Recorder(data.predict), start().double(), Flow(), steps)[-1].x
        torch.testing.assert_close(x[0, 0, 0], torch.tensor(data.mean).double())


@pytest.mark.parametrize("sampler", BOTH)
@pytest.mark.parametrize("x_0_range", [None, (-0.5, 0.5)])
def test_a_step_is_the_paper_s(sampler: Sampler, x_0_range: tuple[float, float] | None) -> None:
    """Written out in t alone, with the velocity that leads from the clamped x_0 to x_t."""
    steps = 6
    denoise = Recorder(DATA.predict)
    run(sampler, denoise, start().double(), Flow(), steps, x_0_range)

    def slope(x: Tensor, t: float) -> Tensor:
        x_0 = x - t * DATA.predict(x, Flow().level(t)).v
        return (x - (x_0 if x_0_range is None else x_0.clamp(*x_0_range))) / t

    x, seen = start().double(), []
    for i in range(steps):
        now, after = 1 - i / steps, 1 - (i + 1) / steps
        seen.append(x)
        guess = x + (after - now) * slope(x, now)
        if isinstance(sampler, HeunFlow) and i < steps - 1:
            seen.append(guess)
            guess = x + (after - now) * (slope(x, now) + slope(guess, after)) / 2
        x = guess
    for (found, _), expected in zip(denoise.asked, seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    last = run(sampler, Recorder(DATA.predict), start().double(), Flow(), steps, x_0_range)[-1]
    torch.testing.assert_close(last.x, x, rtol=1e-9, atol=1e-9)
    expected = last.prediction.x_0
    torch.testing.assert_close(last.x, expected if not x_0_range else expected.clamp(*x_0_range))
    if x_0_range:
        assert expected.abs().max() > 0.5


def test_steps_of_euler_are_those_of_the_grid() -> None:
    denoise = Recorder(DATA.predict)
    taken = run(EulerFlow(), denoise, start(), Flow(), 7)
    grid = Flow().grid(7)
    expected = [Step(i, 7, grid[i], grid[i + 1]) for i in range(7)]
    assert [each.step for each in taken] == [step for _, step in denoise.asked] == expected


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_of_heun_are_its_evaluations(steps: int) -> None:
    denoise = Recorder(DATA.predict)
    taken = [each.step for each in run(HeunFlow(), denoise, start(), Flow(), steps)]
    assert taken == [step for _, step in denoise.asked]
    count = 2 * steps - 1
    assert [step.index for step in taken] == list(range(count))
    assert {step.count for step in taken} == {count}
    progress = [step.progress for step in taken]
    assert progress[0] == 0 and progress == sorted(set(progress)) and progress[-1] < 1
    grid = Flow().grid(steps)
    assert [step.level for step in taken[::2]] == list(grid[:-1])
    assert [step.next for step in taken[::2]] == list(grid[1:])
    assert [(step.level, step.next) for step in taken[1::2]] == [(g, g) for g in grid[1:-1]]


@pytest.mark.parametrize("sampler", BOTH)
def test_the_state_after_a_step_is_where_the_next_one_looks(sampler: Sampler) -> None:
    denoise = Recorder(DATA.predict)
    taken = run(sampler, denoise, start(), Flow(), 6)
    for before, (x_t, _) in zip(taken, denoise.asked[1:], strict=False):
        assert before.x is x_t


@pytest.mark.parametrize("sampler", [EulerFlow, HeunFlow])
def test_a_shift_of_the_sampler_s_own(sampler: type[EulerFlow] | type[HeunFlow]) -> None:
    mine = run(sampler(shift=3.0), Recorder(DATA.predict), start(), Flow(shift=0.5), 5)
    process = run(sampler(), Recorder(DATA.predict), start(), Flow(shift=3.0), 5)
    assert [each.step for each in mine] == [each.step for each in process]
    assert torch.equal(mine[-1].x, process[-1].x)
    with pytest.raises(ValueError, match="shift=0: expected"):
        sampler(shift=0)


@pytest.mark.parametrize("sampler", BOTH)
def test_no_noise_is_drawn_and_nothing_computed_early(sampler: Sampler) -> None:
    class Silent(NoiseSource):
        def normal(self, *_: object) -> Tensor:
            raise AssertionError("noise was drawn")

    denoise = Recorder(DATA.predict)
    steps = sampler.steps(denoise, start(1), Flow(), 10, Silent([0], [0]))
    assert denoise.asked == []
    next(steps)
    next(steps)
    assert len(denoise.asked) == 2
    assert len(list(steps)) == (17 if isinstance(sampler, HeunFlow) else 8)


@pytest.mark.parametrize(("sampler", "name"), [(EulerFlow(), "euler"), (HeunFlow(), "heun")])
def test_other_processes_are_refused(sampler: Sampler, name: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler={name}_flow: .* DDPM; use sampler=ddim"):
        run(sampler, Recorder(DATA.predict), start(), DDPM(), 5)
    with pytest.raises(ValueError, match="steps=0: expected"):
        run(sampler, Recorder(DATA.predict), start(), Flow(), 0)


@pytest.mark.parametrize("sampler", [DDIM(), Ancestral(), DiffusersSampler("heun")], ids=str)
def test_samplers_of_other_processes_name_those_of_a_flow(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="is Flow; use") as refusal:
        run(sampler, Recorder(DATA.predict), start(), Flow(), 5)
    named = [word.strip(";,.") for word in str(refusal.value).split("use ")[1].split()]
    names = [word.removeprefix("sampler=") for word in named if word.startswith("sampler=")]
    found = {type(instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))) for name in names}
    assert found == {EulerFlow, HeunFlow}


def test_configs() -> None:
    assert instantiate(OmegaConf.load(CONFIGS / "euler_flow.yaml")) == EulerFlow()
    assert instantiate(OmegaConf.load(CONFIGS / "heun_flow.yaml")) == HeunFlow()


# --- a network and its guidance ------------------------------------------------------------------
@pytest.fixture
def model(make_dit: MakeDiT) -> ClassConditional:
    """A tiny flow model of latents."""
    return ClassConditional(make_dit(learn_sigma=False), Flow(), kind="v")


def drawn(model: ClassConditional, sampler: Sampler, terms: list[Term], count: int = 2) -> Tensor:
    noise = noise_of(count)
    guided = GuidedDenoiser(model, terms, noise=noise)
    x = noise.normal(0, model.latent_shape)
    y = torch.arange(count)
    taken = sampler.steps(lambda x_t, step: guided(x_t, step, y), x, model.process, 4, noise)
    return [each.x for each in taken][-1]


@pytest.mark.parametrize("sampler", BOTH)
@pytest.mark.parametrize("terms", [[], [SAG(0.5)], [BlurGuidance(0.5)]], ids=str)
def test_both_ends_are_finite(model: ClassConditional, sampler: Sampler, terms: list[Term]) -> None:
    image = drawn(model, sampler, terms)
    assert image.isfinite().all()
    if terms:
        assert (image - drawn(model, sampler, [])).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", BOTH)
def test_an_image_does_not_depend_on_its_batch(model: ClassConditional, sampler: Sampler) -> None:
    together, alone = drawn(model, sampler, [], 3), drawn(model, sampler, [], 1)
    assert_near(together[:1], alone)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("x_0_range", [None, (-1.0, 1.0)], ids=["latent", "pixel"])
@pytest.mark.parametrize("index", [1, 4, 9])
def test_sag_beside_a_flow_is_the_paper_s_form_in_eps(
    make_dit: MakeDiT, index: int, x_0_range: tuple[float, float] | None, scale: float
) -> None:
    """eps + s (eps - eps_bar), from the network's own outputs at x_t and at x_bar."""
    process = Flow(time_scale=scale)
    model = ClassConditional(make_dit(learn_sigma=False), process, "v", x_0_range=x_0_range)
    term = SAG(0.7, layer="blocks.1", blur_sigma=1.5)
    grid = process.grid(10)
    step = Step(index, 10, grid[index], grid[index + 1])
    u = float(step.level.sigma)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1, 2, 3])

    def eps_of(x: Tensor) -> Tensor:
        return x + (1 - u) * model.network(x, torch.full((3,), u * scale), y)

    asked: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    guided = GuidedDenoiser(model, [term])(x_t, step, y)
    hook.remove()
    x_bar = asked[1]
    eps, eps_bar = eps_of(x_t), eps_of(x_bar)
    expected = eps + 0.7 * (eps - eps_bar)
    assert (eps - eps_bar).abs().max() > 1e-3
    assert_near(guided.eps - eps, expected - eps, scale=eps)
    # x_bar holds the same eps and a clean image that is blurred where the mask is set only.
    x_0 = (x_t - u * eps) / (1 - u)
    x_0 = x_0 if x_0_range is None else x_0.clamp(*x_0_range)
    x_0_tilde = (x_bar - u * eps) / (1 - u)
    kept = (x_0_tilde - x_0).abs().amax(dim=1) < 1e-3
    blurred = (x_0_tilde - term.blurred(x_0)).abs().amax(dim=1) < 1e-3
    assert (kept | blurred).all()
    assert 0.05 < blurred.float().mean() < 0.95


def test_guidance_in_v_is_carried_through_a_step(model: ClassConditional) -> None:
    """A term that shifts v by a constant shifts the image by the length of the way, minus that."""

    def shifted(x_t: Tensor, level: NoiseLevel) -> Prediction:
        prediction = DATA.predict(x_t, level)
        return replace(prediction, v=prediction.v + 0.25)

    def straight(x_t: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction(x_t, level, torch.full_like(x_t, 0.25))

    x = start()
    for sampler in BOTH:
        end = run(sampler, Recorder(straight), x, Flow(), 5)[-1].x
        torch.testing.assert_close(end, x - 0.25)
        (one,) = run(sampler, Recorder(shifted), x, Flow(), 1)
        (plain,) = run(sampler, Recorder(DATA.predict), x, Flow(), 1)
        torch.testing.assert_close(one.x, plain.x - 0.25)
