"""CFG's kin: methods that make another update of the conditional and the null prediction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from diffusers.guiders.magnitude_aware_guidance import mambo_guidance
from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance
from torch import Tensor

from sag_dit.guidance import CFG, MAMBO, SMC, TCFG, GuidedDenoiser, Question, Term
from sag_dit.guidance.term import Branch
from sag_dit.process import Prediction, Step
from tests.closeness import assert_near
from tests.guidance.every import MODELS, batch, guided
from tests.guidance.reference import step_at
from tests.guidance.test_null import both


def field(seed: int) -> Tensor:
    """A small image of waves, in float64."""
    waves = torch.sin((torch.arange(12, dtype=torch.float64) + 0.5) * (seed + 1.3))
    return (waves * (1 + 0.1 * seed)).reshape(1, 3, 2, 2)


def added(term: Term, step: Step, answers: Iterable[Prediction], memory: dict[str, Any]) -> Tensor:
    """What a term contributes when its questions are answered so."""
    given = tuple(answers)
    model = MODELS["flow"]
    base = Branch(model, given[0].x_t, torch.tensor([1]))
    null = Branch(model, given[0].x_t, model.null(1))
    asking = term.contribution(Question(step, base, null, memory=memory))
    next(asking)
    with pytest.raises(StopIteration) as stop:
        asking.send(given)
    return torch.as_tensor(stop.value.value)


@pytest.mark.parametrize("model", ["eps", "v", "x_0", "flow"])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_tcfg_and_mambo_are_those_of_diffusers(model: str, index: int) -> None:
    """diffusers' mambo_guidance takes no norm of images here, so that it is given rows."""
    denoiser = MODELS[model]
    step = step_at(denoiser.process, index)
    cond, null = (getattr(each, denoiser.kind) for each in both(denoiser, step))
    rows = cond.flatten(1), null.flatten(1)
    for term, expected in (
        (TCFG(3.0), normalized_guidance(cond, null, 3.0)),
        (MAMBO(4.0, damping=0.5), mambo_guidance(*rows, 4.0, alpha=0.5).view_as(cond)),
        (MAMBO(10.0), mambo_guidance(*rows, 10.0).view_as(cond)),
    ):
        found = getattr(guided(denoiser, [term], step), denoiser.kind)
        # x_0 where almost nothing but noise is known is a small difference of large numbers.
        assert_near(found, expected, 1e-4)


def test_tcfg_keeps_of_the_null_prediction_what_lies_along_the_pair() -> None:
    """In two dimensions by hand: the pair's main direction is that of its 2 x 2 moments."""
    step = step_at(MODELS["flow"].process, 4)
    c, u = field(0), field(3)
    a, b, d = (float((x * y).sum()) for x, y in ((c, c), (c, u), (u, u)))
    largest = (a + d) / 2 + (((a - d) / 2) ** 2 + b**2) ** 0.5
    main = b * c + (largest - a) * u
    kept = (u * main).sum() / (main * main).sum() * main
    pair = (Prediction(field(7), step.level, each) for each in (c, u))
    assert_near(added(TCFG(2.5), step, pair, {}), 1.5 * (c - kept), 1e-10)
    assert float((kept - u).abs().max()) > 0.1


def test_mambo_without_damping_is_cfg_and_much_damping_is_none() -> None:
    step = step_at(MODELS["eps"].process, 4)
    plain, cfg = (guided(MODELS["eps"], terms, step).v for terms in ([], [CFG(2.5)]))
    assert_near(guided(MODELS["eps"], [MAMBO(2.5, damping=0.0)], step).v, cfg)
    assert_near(guided(MODELS["eps"], [MAMBO(2.5, damping=1000.0)], step).v, plain)


GOLDEN = (
    (
        0.506906,
        2.323243,
        0.068173,
        -3.585512,
        -0.231465,
        1.26785,
        0.434661,
        0.35052,
        -3.059818,
        -0.268838,
        3.081992,
        0.621358,
    ),
    (
        0.858642,
        -2.739491,
        4.159308,
        -3.243047,
        0.833897,
        -0.489189,
        0.423941,
        -2.064709,
        1.946552,
        -0.67951,
        -1.570758,
        1.664503,
    ),
    (
        1.171023,
        3.040622,
        2.805193,
        -1.400496,
        -2.685707,
        -1.980111,
        0.121018,
        2.88733,
        2.886821,
        0.153347,
        -1.843557,
        -2.399663,
    ),
)
"""What hanyang-21/CFG-Ctrl at 490a628 (pipeline/common_cfg_ctrl.py, ``_cfg_ctrl_apply``) says of
the predictions field(2 i) and field(2 i + 1) at steps i = 0, 1, 2: lambda 0.5, K 0.2, w 2.5."""


def test_smc_is_that_of_its_authors() -> None:
    memory: dict[str, Any] = {}
    for i, expected in enumerate(GOLDEN):
        step = step_at(MODELS["flow"].process, i)
        pair = (Prediction(field(9), step.level, field(2 * i + j)) for j in (0, 1))
        found = added(SMC(2.5, gain=0.2, surface=0.5), step, pair, memory)
        assert_near(field(2 * i) + found, torch.tensor(expected).double().view(1, 3, 2, 2), 1e-6)


@pytest.mark.parametrize("model", ["eps", "x_0", "flow"])
def test_smc_s_update_is_of_the_networks_own_output(model: str) -> None:
    """Over three steps, in float64; at the first, nothing but the update itself is known."""
    denoiser = MODELS[model]
    x, y = batch()
    asking, before = GuidedDenoiser(denoiser, [SMC(3.0, gain=0.1, surface=2.0)]), None
    for index in (4, 5, 6):
        step = step_at(denoiser.process, index)
        c, u = (getattr(each, denoiser.kind).double() for each in both(denoiser, step))
        s = (c - u) + before if before is not None else 2 * (c - u)
        before = (c - u) - 0.1 * torch.sign(s)
        expected = u + 3 * before
        found = getattr(asking(x, step, y), denoiser.kind)
        # Where s is all but 0, rounding decides its sign.
        decided = s.abs() > 1e-4
        assert decided.double().mean() > 0.99
        assert_near((found * decided).double(), expected * decided, 1e-4)


def test_smc_without_gain_is_cfg_and_at_scale_1_asks_nothing() -> None:
    step = step_at(MODELS["flow"].process, 4)
    cfg = guided(MODELS["flow"], [CFG(2.5)], step).v
    assert_near(guided(MODELS["flow"], [SMC(2.5, gain=0.0)], step).v, cfg)
    assert SMC(1.0, gain=0.5).off


@pytest.mark.parametrize(
    ("kind", "options"), [(MAMBO, {"damping": -1.0}), (SMC, {"gain": -0.1}), (SMC, {"surface": -1})]
)
def test_negative_settings_are_refused(kind: type[Term], options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected 0"):
        kind(2.0, **options)
