"""DiT's objective: the mean squared error, and the variational bound for the learned variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.process import DDPM, NoiseLevel
from sag_dit.process.ddpm import Posterior
from sag_dit.tensors import Images, per_image
from sag_dit.training.objective.base import Losses, Objective, square_error


def normal_kl(mean: Tensor, log_variance: Tensor, other: Tensor, other_log: Tensor) -> Tensor:
    """Return KL(N(mean, exp log_variance) || N(other, exp other_log)) of every number, in nats."""
    ratio = log_variance - other_log
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - other).square() * (-other_log).exp())


def normal_cdf(x: Tensor) -> Tensor:
    """Return the normal distribution function in Page's form, (1 + tanh(...)) / 2.

    0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), within 2e-4 of the exact one.
    Source: Page 1977, Approximations to the cumulative normal function.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def decoder_nll(x_0: Images, mean: Images, log_variance: Images) -> Images:
    """Return -log p(x_0) of every number under a normal distribution that is cut in 255ths.

    p is the mass within 1 / 255 of x_0, half the distance between two pixel values to either side.
    Pixels at the ends of [-1, 1] have the whole tail, and so have latents beyond. In nats.

    Source: Ho et al. 2020, equation 13.
    """
    inverse = (-0.5 * log_variance).exp()
    above = normal_cdf((x_0 - mean + 1 / 255) * inverse)
    below = normal_cdf((x_0 - mean - 1 / 255) * inverse)
    mass = torch.where(x_0 < -0.999, above, torch.where(x_0 > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


@lru_cache(maxsize=8)
def posterior_table(process: DDPM) -> Float[Tensor, "4 t"]:
    """Return q(x_{t-1} | x_t, x_0) for every t: of_x_0, of_x_t, log_lower, log_upper; float64."""
    q = Posterior.of(process.grid(process.num_timesteps))
    rows = [q.of_x_0, q.of_x_t, q.log_lower, q.log_upper]
    table = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return table.flip(1)


def bound(
    process: DDPM, x_0: Images, x_t: Images, level: NoiseLevel, believed: Images, fraction: Images
) -> Float[Tensor, "b"]:
    """Return one term of the variational bound in bits per number, one per image.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_t) at t = 0. p has the
    posterior's mean for the x_0 that is ``believed``, and a log-variance ``fraction`` of the way
    from the posterior's to the forward step's.

    Source: Ho et al. 2020, equations 5 and 6; Nichol & Dhariwal 2021, equation 15.
    """
    t = torch.as_tensor(level.t).long()
    # float32 before the device: not every device has float64.
    table = posterior_table(process).float().to(t.device)[:, t]
    of_x_0, of_x_t, lower, upper = (per_image(row, x_t) for row in table)
    true_mean = of_x_0 * x_0 + of_x_t * x_t
    mean = of_x_0 * believed + of_x_t * x_t
    log_variance = fraction * upper + (1 - fraction) * lower
    kl = normal_kl(true_mean, lower, mean, log_variance)
    nll = decoder_nll(x_0, mean, log_variance)
    nats = torch.where(per_image(t == 0, x_t), nll, kl)
    return nats.flatten(1).mean(dim=1) / math.log(2)


@dataclass(frozen=True)
class Hybrid(Objective):
    """The mean squared error + ``vlb_weight`` times one term of the variational bound.

    The bound trains the variance alone: the mean that it uses is detached from the network.
    DiT's weight is 1; improved diffusion's is num_timesteps / 1000, the same at 1,000 times.

    Source: Nichol & Dhariwal 2021, equation 16; Peebles & Xie 2023, section 3.1.

    Raises:
        ValueError: ``vlb_weight`` is not a finite number of 0 or more.

    Example::

        losses = Hybrid(vlb_weight=1.0)(model.denoiser, x_0, labels)
    """

    key = "dit"
    former = ("sag_dit.training.objective.Hybrid", "sag_dit.training.objective.hybrid.Hybrid")

    vlb_weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.vlb_weight >= 0 and math.isfinite(self.vlb_weight)):
            raise ValueError(f"vlb_weight={self.vlb_weight}: expected 0 or more; 1 is DiT's")

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a process without betas, and a network without variance channels."""
        ddpm_of(denoiser)
        channels = denoiser.latent_shape[0]
        if isinstance(denoiser, ClassConditional) and not denoiser.network.learn_sigma:
            raise no_variance(channels, channels)

    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the sums, and both parts as the terms ``mse`` and ``vlb``.

        Raises:
            ValueError: the network puts out no variance.
        """
        # The network's output, and what it says of the variance.
        process, channels = ddpm_of(denoiser), x_0.shape[1]
        x_t = process.add_noise(x_0, eps, level)
        output = denoiser.evaluate(x_t, level.times(x_t), cond).float()
        if output.shape[1] != 2 * channels:
            raise no_variance(channels, output.shape[1])
        output, variance = output.split(channels, dim=1)
        # The error of the output, and the bound, which trains the variance alone.
        error = square_error(output, process.target(x_0, eps, level, denoiser.kind))
        believed = process.predict(x_t, level, output.detach(), denoiser.kind).x_0
        vlb = bound(process, x_0, x_t, level, believed, (variance + 1) / 2)
        terms = {"mse": error.detach(), "vlb": vlb.detach()}
        return Losses(error + self.vlb_weight * vlb, level, terms)


def no_variance(channels: int, found: int) -> ValueError:
    """Return the error of a network that puts out no variance."""
    return ValueError(
        f"objective=dit: expected {2 * channels} output channels, half of them the variance, and "
        f"the network has {found}; use model.learn_sigma=true, or objective=mse"
    )


def ddpm_of(denoiser: Denoiser) -> DDPM:
    """Return the denoiser's process, whose steps have a variance.

    Raises:
        ValueError: it is not the discrete one.
    """
    if not isinstance(denoiser.process, DDPM):
        raise ValueError(
            f"objective=dit: expected a DDPM process, whose variance can be learned, and this "
            f"model's is {type(denoiser.process).__name__}; use objective=flow or objective=mse"
        )
    return denoiser.process
