"""Rectified gradient guidance: against its authors' code, and its factor against slopes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CADS, CFG, REG, cost_of
from sag_dit.sampler import DDIM, EulerFlow
from tests.closeness import assert_near
from tests.guidance.every import MODELS, batch, guided
from tests.guidance.reference import counted, step_at
from tests.guidance.test_null import both

GOLDEN = (
    (-2.5876259803771973, -1.1776514053344727, -7.292549133300781),
    (-0.7376697063446045, 5.814595699310303, 4.241909027099609),
)
"""What zhengqigao/REG at 59fb5ec (DiT/forward_with_cfg.py, cfg_type "reg_original", cfg_scale 1.5)
says of the first two images at step 4 of 10: their three guided channels at row 3, column 4."""


def test_it_is_that_of_its_authors() -> None:
    eps = guided(MODELS["eps"], [REG(2.5)], step_at(MODELS["eps"].process, 4)).eps
    # Both take the gradient of a float32 network, which processors round differently.
    assert_near(eps[:2, :3, 3, 4], torch.tensor(GOLDEN), 1e-4)


def slope(model: ClassConditional, x: Tensor, y: Tensor, index: int, h: float = 1e-5) -> Tensor:
    """d(sum of eps) / dx of one image (1, c, h, w), pixel by pixel, by differences in float64."""
    level = step_at(model.process, index).level
    steps = h * torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape[1:])
    moved = torch.cat([x + steps, x - steps])
    sums = model(moved, level, y.expand(len(moved))).eps.flatten(1).sum(dim=1)
    above, below = sums.chunk(2)
    return ((above - below) / (2 * h)).view_as(x)


@pytest.mark.parametrize("name", ["eps", "v", "x_0", "flow"])
@pytest.mark.parametrize("index", [2, 9])
def test_the_factor_is_1_less_sigma_times_the_slope_of_eps(name: str, index: int) -> None:
    model = MODELS[name]
    exact = ClassConditional(copy.deepcopy(model.network).double(), model.process, model.kind)
    x, y = batch(1)
    step = step_at(model.process, index)
    rectified = 1 - float(step.level.sigma) * slope(exact, x.double(), y, index)
    cond, null = exact(x.double(), step.level, y), exact(x.double(), step.level, exact.null(1))
    expected = cond.v + 1.5 * rectified * (cond.v - null.v)
    found = guided(model, [REG(2.5)], step, order=[0]).v
    assert_near(found.double(), expected, 1e-4)
    assert float((rectified - 1).abs().max()) > 0.01


def test_it_follows_the_prediction_that_noise_in_the_class_has_changed() -> None:
    """Without the noise the slopes are others."""
    model = MODELS["eps"]
    step = step_at(model.process, 2)
    cads, plain = CADS(0.5), guided(model, [], step).v
    noisy = guided(model, [cads], step).v
    null = 2 * plain - guided(model, [CFG(2.0)], step).v
    here = (guided(model, [cads, REG(2.0)], step).v - noisy) / (noisy - null)
    there = (guided(model, [REG(2.0)], step).v - plain) / (plain - null)
    clear = ((noisy - null).abs() > 0.1) & ((plain - null).abs() > 0.1)
    assert float((here - there)[clear].abs().mean()) > 1e-3


def test_it_leaves_no_gradient_behind() -> None:
    model = MODELS["eps"]
    with torch.no_grad():
        found = guided(model, [REG(2.5)], step_at(model.process, 4))
        assert not torch.is_grad_enabled()
    assert not found.v.requires_grad and not found.x_t.requires_grad
    assert all(each.grad is None for each in model.network.parameters())


def test_its_price_is_that_of_four_passes_and_of_one_where_it_rests() -> None:
    told = cost_of(MODELS["eps"], [REG(2.5)], DDIM(), 5)
    assert told.rows == (2,) * 5 and told.others == (1,) * 5
    assert told.relative == 4
    # A flow begins at pure noise.
    flow = cost_of(MODELS["flow"], [REG(2.5)], EulerFlow(), 5)
    assert flow.rows == (1, 2, 2, 2, 2) and flow.others == (0, 1, 1, 1, 1)
    step = step_at(MODELS["flow"].process, 0)
    with counted(MODELS["flow"]) as rows:
        found = guided(MODELS["flow"], [REG(2.5)], step).v
    assert rows == [3]
    assert torch.equal(found, both(MODELS["flow"], step)[0].v)
