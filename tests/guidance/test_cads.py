"""Condition annealing: noise in the class's embedding, of which all other methods know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CADS, CFG, ICG, SAG, GuidedDenoiser, Term, cost_of
from sag_dit.process import Prediction
from sag_dit.sampler import DDIM
from tests.closeness import assert_near
from tests.guidance import test_unet_methods as unet
from tests.guidance.every import MODELS, NOISE, batch, guided, small_dit
from tests.guidance.reference import counted, step_at

PURPOSE = 8
MODEL = MODELS["eps"]


def noisy(y: Tensor, term: CADS, index: int, s: float) -> Tensor:
    """The paper's equations, image by image, in float64; time is t of a thousand."""
    t = float(step_at(MODEL.process, index).level.t) / 1000
    gamma = 1.0 if t <= term.tau_1 else 0.0
    if term.tau_1 < t < term.tau_2:
        gamma = (term.tau_2 - t) / (term.tau_2 - term.tau_1)
    n = NOISE.normal(index + 1, y.shape[1:], PURPOSE).double()
    rows = []
    for each, random in zip(y.double(), n, strict=True):
        with_noise = gamma**0.5 * each + s * (1 - gamma) ** 0.5 * random
        back = (with_noise - with_noise.mean()) / with_noise.std() * each.std() + each.mean()
        rows.append(term.mixing * back + (1 - term.mixing) * with_noise)
    return torch.stack(rows)


def asked_with(model: ClassConditional, embedder: str, embedding: Tensor, index: int) -> Prediction:
    """What the model says if its classes' embedding is another."""
    x, y = batch()
    module: nn.Module = model.network.get_submodule(embedder)
    hook = module.register_forward_hook(lambda *_: embedding)
    try:
        return model(x, step_at(model.process, index).level, y)
    finally:
        hook.remove()


@pytest.mark.parametrize("index", [0, 3, 5, 8])
@pytest.mark.parametrize("mixing", [1.0, 0.4])
def test_the_class_is_asked_with_the_paper_s_noise(index: int, mixing: float) -> None:
    term = CADS(0.3, tau_1=0.25, tau_2=0.75, mixing=mixing)
    y = MODEL.network.y_embedder(batch()[1])
    changed = noisy(y, term, index, 0.3)
    assert (float((changed - y).abs().max()) < 1e-6) == (index == 8)
    expected = asked_with(MODEL, "y_embedder", changed.float(), index)
    assert_near(guided(MODEL, [term], step_at(MODEL.process, index)).v, expected.v)


def test_a_unet_s_class_is_too() -> None:
    term, (_, y) = CADS(0.3), batch()
    embedding = unet.UNET.network.get_submodule("class_embedding")(y)
    expected = asked_with(unet.UNET, "class_embedding", noisy(embedding, term, 0, 0.3).float(), 0)
    found = guided(unet.UNET, [term], step_at(unet.UNET.process, 0))
    assert_near(found.v, expected.v)
    assert found.variance_fraction is not None and expected.variance_fraction is not None
    assert_near(found.variance_fraction, expected.variance_fraction)


def test_a_schedule_multiplies_the_noise() -> None:
    step = step_at(MODEL.process, 2)
    weighed = CADS(0.3, schedule=lambda progress: 0.5)
    half = guided(MODEL, [CADS(0.15)], step).v
    assert torch.equal(guided(MODEL, [weighed], step).v, half)
    assert not torch.equal(guided(MODEL, [CADS(0.3)], step).v, half)


def test_cfg_guides_from_the_null_class_to_the_noisy_one() -> None:
    """As in the paper: null + w (cond' - null), and the null class has no noise."""
    step = step_at(MODEL.process, 1)
    x, _ = batch()
    null = MODEL(x, step.level, MODEL.null(3)).v
    cond = guided(MODEL, [CADS(0.3)], step).v
    expected = null + 2.5 * (cond - null)
    assert_near(guided(MODEL, [CADS(0.3), CFG(2.5)], step).v, expected)
    assert_near(guided(MODEL, [CFG(2.5), CADS(0.3)], step).v, expected)


def test_icg_s_random_class_has_no_noise() -> None:
    step = step_at(MODEL.process, 1)
    plain = guided(MODEL, [], step).v
    away = (guided(MODEL, [ICG(2.0)], step).v - plain) - plain
    cond = guided(MODEL, [CADS(0.3)], step).v
    assert_near(guided(MODEL, [CADS(0.3), ICG(2.0)], step).v, 2 * cond + away, 1e-4)


@pytest.mark.parametrize("terms", [[], [CFG(2.0)], [SAG(0.5)], [SAG(0.5, branch="null")]])
def test_it_costs_no_pass(terms: list[Term]) -> None:
    step = step_at(MODEL.process, 0)
    with counted(MODEL) as without:
        guided(MODEL, terms, step)
    with counted(MODEL) as rows:
        guided(MODEL, [CADS(0.3), *terms], step)
    assert rows == without
    told = cost_of(MODEL, [CADS(0.3), *terms], DDIM(), 10)
    assert told == cost_of(MODEL, terms, DDIM(), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_1": 0.9, "tau_2": 0.6}, "tau_1=0.9, tau_2=0.6: expected 0 <= tau_1 < tau_2"),
        ({"tau_2": 1.5}, "tau_2=1.5: expected"),
        ({"mixing": 1.5}, "mixing=1.5: expected psi"),
        ({"every": 2}, "every=2: CADS asks nothing by itself"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CADS(0.1, **options)


def test_a_model_without_classes_is_refused() -> None:
    one = ClassConditional(small_dit(num_classes=1), MODEL.process)
    for model in (one, unet.small_unet(num_classes=0, class_dropout_prob=0.0)):
        with pytest.raises(ValueError, match=r"cads_scale=0.1: needs a model of two or more"):
            GuidedDenoiser(model, [CADS(0.1)])
