"""Rectified-CFG++: the difference of CFG, asked where the conditional velocity leads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sag_dit.guidance import CFG, GuidedDenoiser, RectifiedCFGpp, cost_of
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, Prediction, Step
from sag_dit.sampler import EulerFlow, HeunFlow
from tests.closeness import assert_near
from tests.guidance.every import MODELS, batch, guided
from tests.guidance.reference import step_at
from tests.guidance.wavy import START, Wavy, wavy


def run(term: RectifiedCFGpp, steps: int, time_scale: float = 1.0) -> Tensor:
    """The end of a run of Euler's on the formula."""
    process = Flow(time_scale=time_scale)
    guided = GuidedDenoiser(Wavy(process, "v", time_scale), [term])

    def ask(x_t: Tensor, step: Step) -> Prediction:
        return guided(x_t, step, torch.ones(1))

    noise = NoiseSource([0], [0])
    return [each.x for each in EulerFlow().steps(ask, START, process, steps, noise)][-1]


@pytest.mark.parametrize(("reach", "power"), [(0.5, 0.0), (0.5, 2.0), (0.25, 0.5)])
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_a_run_is_the_paper_s_algorithm(reach: float, power: float, time_scale: float) -> None:
    """v = v_cond + lambda (1 - u)^gamma (v_cond - v_null)(half a step ahead), in float64."""
    steps, x = 7, START.double()
    for i in range(steps):
        u, du = (steps - i) / steps, 1 / steps
        v = wavy(x, u, 1.0)
        middle, there = x - reach * du * v, u - reach * du
        difference = wavy(middle, there, 1.0) - wavy(middle, there, 0.0)
        x = x - du * (v + 1.5 * (1 - u) ** power * difference)
    found = run(RectifiedCFGpp(1.5, reach=reach, power=power), steps, time_scale)
    assert_near(found.double(), x, 1e-5)


def test_a_whole_step_ahead_it_is_the_authors_code() -> None:
    """From shreshthsaini/Rectified-CFGpp, rect-cfg-SD3-pipeline/pipeline.py at 95f2ba1.

    Its pipeline with true_cfg = 1.5, 6 steps and sigma_noise = 0, on the formula in wavy.py, with a
    scheduler whose times run from 1: it adds a difference of sigmas to its time.
    """
    golden = [
        *(-1.124806404, -0.722468674, -0.740844727, -0.644641519),
        *(-0.820860744, -0.281538785, -0.007664755, 0.412674010),
    ]
    found = run(RectifiedCFGpp(1.5, reach=1.0), 6)
    assert_near(found.flatten(), torch.tensor(golden), 1e-5)


def test_with_no_reach_it_is_cfg() -> None:
    step = step_at(Flow(), 4)
    found = guided(MODELS["flow"], [RectifiedCFGpp(0.5, reach=0.0)], step)
    assert_near(found.v, guided(MODELS["flow"], [CFG(1.5)], step).v)
    ahead = guided(MODELS["flow"], [RectifiedCFGpp(0.5)], step)
    assert (ahead.v - found.v).abs().max() > 1e-3


def test_it_costs_two_passes_more() -> None:
    assert cost_of(MODELS["flow"], [RectifiedCFGpp(1.5)], EulerFlow(), 10).passes == 30
    assert cost_of(MODELS["flow"], [RectifiedCFGpp(1.5)], HeunFlow(), 5).passes == 27
    with_cfg = [RectifiedCFGpp(0.5), CFG(1.5)]
    assert cost_of(MODELS["flow"], with_cfg, EulerFlow(), 10).passes == 40


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    step, (x, y) = step_at(Flow(), 4), batch()
    whole = guided(MODELS["flow"], [RectifiedCFGpp(1.5)], step)
    one = GuidedDenoiser(MODELS["flow"], [RectifiedCFGpp(1.5)])(x[1:2], step, y[1:2])
    assert_near(one.v, whole.v[1:2], 1e-4)


def test_what_it_cannot_do_is_refused() -> None:
    for options, told in (
        ({"reach": 1.5}, "reach=1.5"),
        ({"reach": -0.1}, "reach=-0.1"),
        ({"power": -1.0}, "power=-1.0"),
    ):
        with pytest.raises(ValueError, match=told):
            RectifiedCFGpp(1.5, **options)
    with pytest.raises(
        ValueError, match=r"rcfgpp_scale=1\.5: Rectified-CFG\+\+ guides flow models"
    ):
        GuidedDenoiser(Wavy(DDPM(), "eps", 1000.0), [RectifiedCFGpp(1.5)])
