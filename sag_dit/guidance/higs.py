"""History-guided sampling (Sadat et al., ICLR 2026, arXiv 2509.22300)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from sag_dit.guidance.apg import inner
from sag_dit.guidance.history import begins
from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.tensors import Images, sent

SHARPNESS = 50.0
"""lambda of the paper: how sharply the filter cuts."""


@cache
def cosines(n: int) -> Tensor:
    """Return the orthonormal matrix (n, n) of the discrete cosine transform, DCT-II."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


@cache
def passed(h: int, w: int, cutoff: float) -> Tensor:
    """Return what each cosine is multiplied by, (h, w): sigmoid(lambda (R - cutoff)).

    R^2 = (row / h)^2 + (column / w)^2.
    """
    row, column = torch.arange(h)[:, None] / h, torch.arange(w) / w
    return torch.sigmoid(SHARPNESS * (torch.hypot(row, column) - cutoff))


def high_frequencies(x: Images, cutoff: float) -> Images:
    """Return images without the cosines whose radial frequency is below ``cutoff``, a share of 1.

    How much of each cosine passes is told by :func:`passed`.
    """
    h, w = x.shape[2:]
    down, across, share = (
        sent(each.to(x.dtype), x.device) for each in (cosines(h), cosines(w), passed(h, w, cutoff))
    )
    return torch.as_tensor(down.T @ (share * (down @ x @ across.T)) @ across)


@dataclass(frozen=True)
class HiGS(Term):
    """x_0 + w(t) highpass(x_0 - mean of the steps before), at no further pass; w = 0 is off.

    x_0 is that guided by the other terms. The mean is g <- a x_0 + (1 - a) g, from g = 0 on, with
    ``share`` a. The difference from it is split into a part parallel to x_0, of which the share
    ``eta`` stays, and one orthogonal to it; then low frequencies, which hold colours, are taken
    out, see :func:`high_frequencies`. w(t) = w sqrt((t - t_min) / (t_max - t_min)) for t in
    (t_min, t_max], else 0, where t is the share of the noisiest time. The first step only begins
    the mean. It also takes in steps outside of the interval, and of a solver's step the first
    evaluation.

    Published: SiT-XL w = 1; DiT-XL/2 w = 2, eta = 0, t_min = 0.3, with CFG at 1.25; Stable
    Diffusion XL and 3 w = 1.75, a = 0.5 and eta = 1 for preferences, a = 0.75 and eta = 0 for FID.

    Source: equations 5 to 9 and algorithms 2 and 3 of the paper.

    Raises:
        ValueError: ``share`` is not in (0, 1), or t_min and t_max are not in order.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CFG(1.25), HiGS(2.0, eta=0.0)], steps=15)
    """

    key = "higs"
    title = "HiGS"
    does = "away from the mean x_0 of the steps before, in high frequencies; no further pass"
    moves = "away from what it drew at the steps before, in fine structure"
    look = "outlines and details"
    source = "Sadat et al. 2026"
    search = MappingProxyType({"scale": (0.5, 3.0), "eta": [0.0, 1.0], "share": [0.5, 0.75]})

    on_guided = True
    remembers = True

    _: KW_ONLY
    share: float = 0.75
    """Share of the newest step in the mean of those before."""
    eta: float = 1.0
    """Share of the update that is parallel to the prediction; less than 1 saturates less."""
    cutoff: float = 0.05
    """Radial frequency below which the update is taken out; 1 is the finest."""
    t_min: float = 0.4
    """Share of the noisiest time from which the weight rises."""
    t_max: float = 1.0
    """Share of the noisiest time at which the weight is full; above it there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}: expected a number between 0 and 1")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"t_min={self.t_min}, t_max={self.t_max}: expected 0 <= t_min < t_max <= 1, shares "
                f"of the noisiest time"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return the update of x_0 as one of v, -1 / sigma of it, and take x_0 into the mean."""
        yield ()
        x_0, mean = ask.guided.x_0, ask.memory.get("mean")
        if begins(ask):
            before = 0.0 if mean is None else (1 - self.share) * mean
            ask.memory["mean"] = self.share * x_0 + before
        t = ask.base.model.process.elapsed(ask.step.level)
        if mean is None or not self.t_min < t <= self.t_max:
            return torch.zeros_like(x_0)
        update = x_0 - mean
        parallel = inner(update, x_0) / inner(x_0, x_0).clamp(min=1e-12) * x_0
        update = high_frequencies(update - (1 - self.eta) * parallel, self.cutoff)
        weight = self.scale * math.sqrt((t - self.t_min) / (self.t_max - self.t_min))
        return -weight / ask.step.level.sigma * update
