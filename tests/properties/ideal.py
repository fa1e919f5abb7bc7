"""A denoiser in closed form: the best possible one for images that are mixtures of Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sag_dit.denoiser import Denoiser
from sag_dit.process import DDPM
from sag_dit.tensors import Images, Labels


class Ideal(Denoiser):
    """Class y is N(means[y], spread^2) in every pixel; the null condition is their even mixture.

    Everything is float64, so that what is left of an error is the caller's.
    """

    def __init__(self, means: Sequence[float], spread: float, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = nn.Identity()
        self.process = DDPM()
        self.kind = "eps"
        self.latent_shape = shape
        self.x_0_range = None
        self.layers = {}
        self.means = torch.tensor(means, dtype=torch.float64)
        self.spread = spread

    def log_density(self, x_t: Images, t: int, cond: Labels) -> Tensor:
        """log p_t(x_t | condition) up to a constant, one number per image."""
        level = self.process.level(t)
        variance = level.alpha**2 * self.spread**2 + level.sigma**2  # type: ignore[operator]
        means = level.alpha * self.means
        distance = (x_t[:, None] - means[:, None, None, None]).square().flatten(2).sum(dim=2)
        per_class = -distance / (2 * variance)
        known = cond < len(self.means)
        own = per_class.gather(1, cond.clamp(max=len(self.means) - 1)[:, None])[:, 0]
        return torch.where(known, own, per_class.logsumexp(dim=1))

    def evaluate(self, x_t: Images, t: Tensor, cond: Labels) -> Images:
        """The ideal noise prediction, -sigma times the score."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            density = self.log_density(x, int(t[0]), cond).sum()
            (score,) = torch.autograd.grad(density, x)
        return -self.process.level(int(t[0])).sigma * score

    def null(self, count: int) -> Labels:
        return torch.full((count,), len(self.means))

    def join(self, conditions: Sequence[Labels]) -> Labels:
        return torch.cat(list(conditions))
