"""Objectives: the plain and the weighted error, what is drawn, configs, and in the module."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sag_dit.checkpoints import Model
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import MSE, FlowMatching, Hybrid, MinSNR, Objective, mse
from sag_dit.training.objective.min_snr import min_snr_weight
from tests.conftest import MakeDiT
from tests.training import reference
from tests.training.reference import COUNT, KINDS, PROCESSES, Batch, clean, on_curve, times

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "objective"


@pytest.fixture
def batch() -> Batch:
    return reference.batch()


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_and_min_snr(
    make_dit: MakeDiT,
    batch: Batch,
    process: Process,
    kind: OutputKind,
) -> None:
    """The plain error of the output, and min(SNR, gamma) times the error of the x_0 it means."""
    network = make_dit()
    denoiser = ClassConditional(network, process, kind)
    x_0, y, eps = batch
    t, flow = times(process), isinstance(process, Flow)
    alpha, sigma = on_curve(process, t)
    x_t = alpha * x_0 + sigma * eps
    out = network(x_t, t, y)[:, :4]
    v = eps - x_0 if flow else alpha * eps - sigma * x_0
    error = (out - {"eps": eps, "v": v, "x_0": x_0}[kind]).pow(2).mean((1, 2, 3))

    level = process.level(t)
    plain = MSE().losses(denoiser, x_0, y, level, eps)
    torch.testing.assert_close(plain.per_image, error, rtol=1e-4, atol=1e-6)
    assert torch.equal(plain.per_image, mse(denoiser, x_0, y, level, eps))
    assert plain.level is level and plain.terms == {}

    found = MinSNR(gamma=2.0).losses(denoiser, x_0, y, level, eps)
    of_x_0 = (clean(kind, flow, x_t, out, alpha, sigma) - x_0).pow(2).mean((1, 2, 3))
    snr = (alpha / sigma).pow(2).flatten()
    assert (snr > 2).any() and (snr < 2).any()
    torch.testing.assert_close(found.per_image, snr.clamp(max=2) * of_x_0, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.terms["mse"], plain.per_image)


def test_min_snr_weights_are_the_paper_s() -> None:
    """For x_0, eps and v: min(SNR, 5), divided by 1, SNR and SNR + 1 (section 3.4)."""
    process = DDPM()
    level = process.level(torch.arange(1000))
    alpha_bar = torch.tensor(process.alphas_cumprod)
    snr = alpha_bar / (1 - alpha_bar)
    least = snr.clamp(max=5)
    for kind, divisor in (("x_0", 1), ("eps", snr), ("v", snr + 1)):
        weight = min_snr_weight(level, kind, 5.0)  # type: ignore[arg-type]
        torch.testing.assert_close(weight, (least / divisor).float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("kind", "ends"), [("x_0", (5, 0)), ("eps", (0, 1)), ("v", (0, 0))])
def test_min_snr_weights_are_finite_at_both_ends(
    kind: OutputKind, ends: tuple[float, float]
) -> None:
    weight = min_snr_weight(Flow().level(torch.tensor([0.0, 1.0])), kind, 5.0)
    assert tuple(weight.tolist()) == ends


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_call_draws_times_then_noise_from_torch_s_generator(
    make_dit: MakeDiT, batch: Batch, process: Process
) -> None:
    denoiser, (x_0, y, _) = ClassConditional(make_dit(), process, "v"), batch
    torch.manual_seed(5)
    found = MSE()(denoiser, x_0, y)
    torch.manual_seed(5)
    u, eps = torch.rand(COUNT), torch.randn_like(x_0)
    assert torch.equal(torch.as_tensor(found.level.t), process.time_at(u))
    expected = mse(denoiser, x_0, y, process.level(process.time_at(u)), eps)
    assert torch.equal(found.per_image, expected) and found.per_image.shape == (COUNT,)
    assert not torch.equal(MSE()(denoiser, x_0, y).per_image, found.per_image)


def test_times_are_drawn_finely_under_a_16_bit_default_type() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        for objective in (MSE(), FlowMatching("logit_normal")):
            u = objective.quantiles(4096, torch.device("cpu"))
            assert u.dtype == torch.float32 and len(u.unique()) > 4000
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(gamma=0), "gamma=0: expected a number above 0"),
        (lambda: MinSNR(gamma=math.inf), "gamma=inf: expected"),
        (lambda: FlowMatching("lognormal"), "times='lognormal': expected 'uniform' or"),
        (lambda: FlowMatching(std=0.0), "std=0.0: expected"),
        (lambda: FlowMatching(mean=math.nan), "mean=nan: expected"),
        (lambda: Hybrid(vlb_weight=-1), "vlb_weight=-1: expected"),
    ],
)
def test_impossible_settings(make: type[Objective], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_configs() -> None:
    found = {path.stem: instantiate(OmegaConf.load(path)) for path in CONFIGS.glob("*.yaml")}
    assert found == {"mse": MSE(), "dit": Hybrid(), "min_snr": MinSNR(), "flow": FlowMatching()}


# --- in the module -------------------------------------------------------------------------------
def module(denoiser: ClassConditional, objective: Objective | None) -> DiffusionModule:
    model = Model(denoiser, IdentityCodec(), "tiny", "", {}, denoiser.class_names)
    return DiffusionModule(model, objective=objective)


@pytest.mark.parametrize("objective", [None, MinSNR(), Hybrid()], ids=str)
def test_the_module_minimises_its_objective(
    denoiser: ClassConditional, objective: Objective | None
) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 8, 8), dtype=torch.uint8, generator=random)
    y = torch.tensor([1, 2, 3])
    torch.manual_seed(1)
    built = module(denoiser, objective)
    found = built.losses(built.denoiser, (images, y)).per_image.mean()
    torch.manual_seed(1)
    x_0 = IdentityCodec().encode(images)
    expected = (objective or MSE())(denoiser, x_0, y).per_image.mean()
    assert torch.equal(found, expected)


def test_the_module_refuses_an_objective_before_training(denoiser: ClassConditional) -> None:
    with pytest.raises(ValueError, match="objective=flow: expected a Flow process"):
        module(denoiser, FlowMatching())


@pytest.mark.parametrize(
    ("objective", "process", "kind"),
    [
        (MSE(), DDPM(), "eps"),
        (Hybrid(), DDPM(), "eps"),
        (MinSNR(), DDPM("cosine"), "v"),
        (FlowMatching("logit_normal"), Flow(), "v"),
    ],
    ids=["mse", "dit", "min_snr", "flow"],
)
def test_an_objective_can_be_minimised(
    make_dit: MakeDiT, objective: Objective, process: Process, kind: OutputKind
) -> None:
    network = make_dit(depth=1, learn_sigma=isinstance(objective, Hybrid)).requires_grad_()
    denoiser = ClassConditional(network, process, kind)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x_0 = torch.zeros(16, 4, 8, 8)
    x_0[:, :, 2:6] = 1
    losses = []
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = objective(denoiser, x_0, torch.zeros(16, dtype=torch.long)).per_image.mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
