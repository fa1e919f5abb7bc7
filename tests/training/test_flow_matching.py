"""Flow matching: its error at every time, and the times it draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM, Flow, Process
from sag_dit.training.objective import MSE, FlowMatching
from tests.conftest import MakeDiT
from tests.training import reference
from tests.training.reference import PROCESSES, Batch


@pytest.fixture
def batch() -> Batch:
    return reference.batch()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_flow_matching(make_dit: MakeDiT, batch: Batch, scale: float) -> None:
    """Both ends of the line are ordinary places."""
    network, process = make_dit(learn_sigma=False), Flow(time_scale=scale)
    denoiser, (x_0, y, eps) = ClassConditional(network, process, "v"), batch
    u = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])
    found = FlowMatching().losses(denoiser, x_0, y, process.level(u * scale), eps)
    w = u[:, None, None, None]
    v = network((1 - w) * x_0 + w * eps, u * scale, y)
    expected = (v - (eps - x_0)).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(found.per_image, expected, rtol=1e-4, atol=1e-6)
    assert FlowMatching("logit_normal")(denoiser, x_0, y).per_image.isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5), (math.log(3), 1.0), (1, 2.5)])
def test_logit_normal_times(mean: float, std: float) -> None:
    """The logits are normal: mean, spread and quantiles, to five standard errors."""
    torch.manual_seed(0)
    n = 40_000
    u = FlowMatching("logit_normal", mean, std).quantiles(n, torch.device("cpu")).double()
    assert u.min() >= 0 and u.max() < 1
    z = (u.logit() - mean) / std
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.std() - 1) < 5 / (2 * n) ** 0.5
    for p in (0.05, 0.25, 0.5, 0.75, 0.95):
        below = (u < torch.sigmoid(mean + std * Normal(0, 1).icdf(torch.tensor(p)))).double()
        assert abs(below.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_uniform_times() -> None:
    torch.manual_seed(0)
    n = 40_000
    for objective in (MSE(), FlowMatching("uniform")):
        u = objective.quantiles(n, torch.device("cpu"))
        assert u.min() >= 0 and u.max() < 1
        counts = torch.histc(u, 10, 0, 1) / n
        assert (counts - 0.1).abs().max() < 5 * (0.09 / n) ** 0.5


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_no_draw_falls_outside_the_process(process: Process) -> None:
    """Also where a sigmoid rounds to 1."""
    u = FlowMatching("logit_normal", mean=50.0).quantiles(100, torch.device("cpu"))
    assert u.max() == 1 - 2**-24
    process.level(float(process.time_at(u).max()))


def test_flow_matching_refuses_other_models(make_dit: MakeDiT) -> None:
    with pytest.raises(ValueError, match=r"objective=flow: expected a Flow process.*is DDPM"):
        FlowMatching().check(ClassConditional(make_dit(), DDPM(), "v"))
    with pytest.raises(ValueError, match=r"expected a network of kind 'v'.*is 'eps'"):
        FlowMatching().check(ClassConditional(make_dit(), Flow(), "eps"))
    FlowMatching().check(ClassConditional(make_dit(), Flow(), "v"))


@pytest.mark.parametrize("settings", [{"mean": 2.0}, {"std": 2.0}])
def test_uniform_times_refuse_what_they_do_not_look_at(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="uniform times have none"):
        FlowMatching(**settings)
    FlowMatching("logit_normal", **settings)
