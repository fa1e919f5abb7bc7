"""What else is made of a conditional and a null prediction, against diffusers' own functions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from benchmarks.methods import classes, setting
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import APG, CFG, ICG, CFGZero, GuidedDenoiser, Term
from sag_dit.process import DDPM, Flow, Prediction, Step
from sag_dit.sampler import EulerFlow, HeunFlow, Sampler
from tests.closeness import assert_near
from tests.guidance.every import MODELS, NOISE, batch, guided, small_dit
from tests.guidance.reference import step_at


def both(model: ClassConditional, step: Step) -> tuple[Prediction, Prediction]:
    """The conditional and the null prediction."""
    x, y = batch()
    return model(x, step.level, y), model(x, step.level, model.null(3))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_rescale_is_of_what_the_network_puts_out(model: str, phi: float) -> None:
    denoiser = MODELS[model]
    for index in (0, 9):
        step = step_at(denoiser.process, index)
        cond, null = (getattr(p, denoiser.kind) for p in both(denoiser, step))
        expected = rescale_noise_cfg(null + 3.0 * (cond - null), cond, phi)
        found = getattr(guided(denoiser, [CFG(3.0, rescale=phi)], step), denoiser.kind)
        # x_0 where almost nothing but noise is known is a small difference of large numbers.
        assert_near(found, expected, 1e-4)
    deviations = [x.std(dim=(1, 2, 3)) for x in (found, cond)]
    assert torch.allclose(*deviations, rtol=1e-3) is (phi == 1)


@pytest.mark.parametrize("model", ["eps", "v", "flow"])
@pytest.mark.parametrize(
    ("eta", "norm", "momentum"), [(0.0, 0.0, 0.0), (0.3, 4.0, 0.0), (0.0, 4.0, -0.5), (1.0, 0, 0.5)]
)
def test_apg_is_the_paper_s_in_x_0(model: str, eta: float, norm: float, momentum: float) -> None:
    """Over three steps, since its momentum remembers."""
    denoiser = MODELS[model]
    x, y = batch()
    term = APG(4.0, eta=eta, norm_threshold=norm, momentum=momentum)
    asking, buffer = GuidedDenoiser(denoiser, [term]), MomentumBuffer(momentum)
    for index in (4, 5, 6):
        step = step_at(denoiser.process, index)
        cond, null = (p.x_0 for p in both(denoiser, step))
        expected = normalized_guidance(
            cond, null, 3.0, buffer, eta, norm, use_original_formulation=True
        )
        found = asking(x, step, y).x_0
        assert_near(found, expected)
        assert (found - cond).abs().max() > 0.1


def test_apg_that_projects_nothing_is_cfg() -> None:
    step = step_at(DDPM(), 4)
    plain = APG(2.5, eta=1.0, momentum=0.0)
    cfg = guided(MODELS["eps"], [CFG(2.5)], step).v
    assert_near(guided(MODELS["eps"], [plain], step).v, cfg)


def test_cfg_zero_scales_the_null_velocity_and_zeroes_the_first_steps() -> None:
    denoiser = MODELS["flow"]
    for index, zeroed in ((0, True), (1, True), (2, False), (9, False)):
        step = step_at(denoiser.process, index)
        cond, null = (p.v for p in both(denoiser, step))
        scale = cfg_zero_star_scale(cond.flatten(1), null.flatten(1))[:, :, None, None]
        expected = null * scale + 3.0 * (cond - null * scale)
        found = guided(denoiser, [CFGZero(3.0, zero_steps=2)], step).v
        assert_near(found, 0 * expected if zeroed else expected)
        assert (scale - 1).abs().min() > 1e-2


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("sampler", [EulerFlow(), HeunFlow()])
def test_cfg_zero_counts_steps_of_the_grid_not_evaluations(sampler: Sampler, count: int) -> None:
    """x stands still as long as the velocity is 0, also where a step has two evaluations."""
    denoiser = MODELS["flow"]
    x, y = batch()
    asking = GuidedDenoiser(denoiser, [CFGZero(3.0, zero_steps=count)])
    states = [
        each.x
        for each in sampler.steps(
            lambda x_t, step: asking(x_t, step, y), x, denoiser.process, 4, NOISE
        )
    ]
    evaluations = count * (2 if isinstance(sampler, HeunFlow) else 1)
    assert [torch.equal(state, x) for state in states].count(True) == evaluations
    assert not any(torch.equal(state, x) for state in states[evaluations:])


def test_cfg_zero_zeroes_nothing_outside_its_interval() -> None:
    denoiser = MODELS["flow"]
    x, y = batch()
    asking = GuidedDenoiser(denoiser, [CFGZero(3.0, zero_steps=2, interval=(0.2, 1.0))])
    for index in (1, 2):
        step = step_at(denoiser.process, index)
        assert asking(x, step, y).v.abs().min() > 0


def test_icg_draws_each_image_and_step_a_class_of_its_own() -> None:
    denoiser = MODELS["eps"]
    x, y = batch()
    drawn: list[Tensor] = []
    for index in range(10):
        step = step_at(denoiser.process, index)
        uniform = torch.special.ndtr(NOISE.normal(index + 1, (1,), purpose=4)[:, 0])
        drawn.append((uniform * 10).long())
        other = denoiser(x, step.level, drawn[-1])
        cond = denoiser(x, step.level, y)
        found = guided(denoiser, [ICG(1.4)], step).v
        expected = other.v + 1.4 * (cond.v - other.v)
        assert_near(found, expected)
    classes = torch.stack(drawn)
    assert classes.min() >= 0 and classes.max() <= 9 and len(classes.unique()) > 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(2.0, rescale=1.5), "rescale=1.5: expected phi from 0"),
        (lambda: APG(2.0, norm_threshold=-1.0), "norm_threshold=-1.0"),
        (lambda: APG(2.0, momentum=-1.0), "momentum=-1.0"),
        (lambda: CFGZero(2.0, zero_steps=-1), "zero_steps=-1"),
        (
            lambda: CFGZero(2.0, schedule="linear"),
            "zero_steps=1 beside schedule='linear'.*set zero",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Term], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("term", [CFG(2.0), APG(2.0), CFGZero(2.0)])
def test_a_model_without_a_null_condition_is_refused(term: Term) -> None:
    model = ClassConditional(small_dit(class_dropout_prob=0.0), Flow(), kind="v")
    name = type(term).__name__.lower()
    with pytest.raises(ValueError, match=rf"{name}_scale=2.0.*set {name}_scale=1"):
        GuidedDenoiser(model, [term])


def test_cfg_zero_that_zeroes_nothing_takes_a_schedule() -> None:
    assert CFGZero(2.0, zero_steps=0, schedule="linear").schedule == "linear"
    assert CFGZero(1.0, schedule="linear").off


def test_cfg_zero_is_for_flows_and_icg_for_classes() -> None:
    of_flows = [kind for kind in classes() if "flow" in kind.needs]
    assert CFGZero in of_flows
    for kind in of_flows:
        told = re.escape(f"{kind.title} guides flow models") + ".*DDPM"
        with pytest.raises(ValueError, match=told):
            GuidedDenoiser(MODELS["eps"], [setting(kind, 1.0)])
    single = ClassConditional(small_dit(num_classes=1, class_dropout_prob=0.0), DDPM())
    with pytest.raises(ValueError, match="two or more classes; set icg_scale=1"):
        GuidedDenoiser(single, [ICG(2.0)])
