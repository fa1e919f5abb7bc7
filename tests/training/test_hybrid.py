"""DiT's objective against a divergence of normal distributions and Ho et al.'s decoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM, Flow
from sag_dit.process.base import OutputKind
from sag_dit.training.objective import Hybrid, hybrid, mse
from tests.conftest import MakeDiT
from tests.training import reference
from tests.training.reference import COUNT, KINDS, Batch, clean, on_curve


@pytest.fixture
def batch() -> Batch:
    return reference.batch()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_hybrid_is_mse_and_a_divergence_of_normals(
    make_dit: MakeDiT,
    batch: Batch,
    kind: OutputKind,
    schedule: str,
) -> None:
    process = DDPM(schedule)  # type: ignore[arg-type]
    network = make_dit()
    x_0, y, eps = batch
    t = torch.tensor([1, 40, 250, 500, 900])
    found = Hybrid(vlb_weight=0.25).losses(
        ClassConditional(network, process, kind), x_0, y, process.level(t), eps
    )
    alpha, sigma = on_curve(process, t)
    x_t = alpha * x_0 + sigma * eps
    out, fraction = network(x_t, t, y).chunk(2, dim=1)
    believed = clean(kind, False, x_t, out, alpha, sigma).double()

    alpha_bar = torch.tensor((1 - process.betas).cumprod())
    beta = torch.tensor(process.betas)[t][:, None, None, None]
    now, before = (alpha_bar[i][:, None, None, None] for i in (t, t - 1))

    def posterior_mean(image: Tensor) -> Tensor:
        of_x_t = (1 - beta).sqrt() * (1 - before) * x_t.double()
        return (before.sqrt() * beta * image + of_x_t) / (1 - now)

    small = beta * (1 - before) / (1 - now)
    variance = small * (beta / small) ** ((fraction.double() + 1) / 2)
    q = Normal(posterior_mean(x_0.double()), small.sqrt())
    p = Normal(posterior_mean(believed), variance.sqrt())
    bits = kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found.terms["vlb"].double(), bits, rtol=1e-3, atol=1e-5)
    error = mse(ClassConditional(network, process, kind), x_0, y, process.level(t), eps)
    torch.testing.assert_close(found.terms["mse"], error)
    torch.testing.assert_close(found.per_image.double(), error + 0.25 * bits, rtol=1e-3, atol=1e-5)


def test_the_decoder_gives_every_pixel_value_its_mass() -> None:
    """Over the 256 values of a pixel the masses sum to 1, and are those of a normal."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.3, 0.05), (-0.99, 0.02), (2.0, 0.8), (0.0, 0.01)):
        log_variance = torch.full_like(values, 2 * math.log(std))
        mass = (-hybrid.decoder_nll(values, torch.full_like(values, mean), log_variance)).exp()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
        exact = Normal(mean, std).cdf(values + 1 / 255) - Normal(mean, std).cdf(values - 1 / 255)
        inner = slice(1, -1)
        torch.testing.assert_close(mass[inner], exact[inner], rtol=0, atol=5e-4)


def test_at_t_0_the_bound_is_the_decoder_s(make_dit: MakeDiT, batch: Batch) -> None:
    process, network = DDPM(), make_dit()
    x_0, y, eps = batch
    denoiser = ClassConditional(network, process, "x_0")
    level = process.level(torch.zeros(COUNT, dtype=torch.long))
    found = Hybrid().losses(denoiser, x_0, y, level, eps)
    mean, fraction = network(process.add_noise(x_0, eps, level), level.t, y).chunk(2, dim=1)
    beta = process.betas
    small = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))
    log_variance = math.log(small) + (fraction + 1) / 2 * math.log(beta[0] / small)
    nats = hybrid.decoder_nll(x_0, mean, log_variance).mean((1, 2, 3))
    torch.testing.assert_close(found.terms["vlb"], nats / math.log(2), rtol=1e-4, atol=1e-4)


def test_the_bound_trains_the_variance_and_the_error_the_mean(
    make_dit: MakeDiT, batch: Batch
) -> None:
    network = make_dit().requires_grad_()
    x_0, y, eps = batch
    denoiser = ClassConditional(network, DDPM(), "eps")
    level = DDPM().level(torch.tensor([0, 1, 100, 500, 999]))
    bias = network.final_layer.linear.bias

    def gradient(loss: Tensor) -> Tensor:
        # The last layer's outputs are (patch, patch, channel): 4 of the mean, 4 of the variance.
        return torch.autograd.grad(loss.sum(), bias)[0].reshape(4, 8)

    plain = gradient(mse(denoiser, x_0, y, level, eps))
    both = gradient(Hybrid().losses(denoiser, x_0, y, level, eps).per_image)
    torch.testing.assert_close(both[:, :4], plain[:, :4])
    assert plain[:, 4:].abs().max() == 0 < both[:, 4:].abs().max()


def test_hybrid_refuses_what_has_no_variance(make_dit: MakeDiT) -> None:
    with pytest.raises(ValueError, match=r"objective=dit: expected a DDPM process.*is Flow"):
        Hybrid().check(ClassConditional(make_dit(), Flow(), "v"))
    plain = ClassConditional(make_dit(learn_sigma=False), DDPM())
    with pytest.raises(ValueError, match=r"expected 8 output channels.*learn_sigma=true"):
        Hybrid().check(plain)
    with pytest.raises(ValueError, match=r"expected 8 output channels.* has 4"):
        Hybrid()(plain, torch.zeros(2, 4, 8, 8), torch.tensor([0, 1]))
    Hybrid().check(ClassConditional(make_dit(), DDPM()))
