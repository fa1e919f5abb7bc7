"""The vocabulary of the forward process x_t = alpha x_0 + sigma eps.

Both processes of this package trace a curve (alpha, sigma) whose velocity v = d_alpha x_0 + d_sigma
eps satisfies alpha d_sigma - sigma d_alpha = 1. Therefore x_0 and eps follow from x_t and v without
a division, at every t:

    x_0 =  d_sigma x_t - sigma v
    eps = -d_alpha x_t + alpha v

Variance preserving: d_alpha = -sigma, d_sigma = alpha (Salimans & Ho 2022, section 4).
Flow (linear interpolant): d_alpha = -1, d_sigma = 1 (Lipman et al. 2023; our t = 1 is noise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sag_dit.tensors import Images, Scalar

OutputKind = Literal["eps", "v", "x_0", "score"]


@dataclass(frozen=True)
class NoiseLevel:
    """Where on the curve (alpha, sigma) an image stands.

    Values are Python floats (double precision) while sampling, where a whole batch shares one
    level, and tensors in training: ``t`` of shape (b,), the others broadcastable to images.
    ``t`` is the time that the network is told; larger is noisier.

    Example:
        >>> level = NoiseLevel(t=500.0, alpha=0.8, sigma=0.6, d_alpha=-0.6, d_sigma=0.8)
        >>> level.times(torch.zeros(2, 3, 8, 8))
        tensor([500, 500])
    """

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    d_alpha: Scalar
    d_sigma: Scalar

    def times(self, x_t: Images) -> Tensor:
        """Return the network's time for every row of ``x_t``, shape (b,)."""
        if isinstance(self.t, Tensor):
            return self.t.to(x_t.device)
        # An integral time is passed as an integer, as the published samplers do.
        t = int(self.t) if float(self.t).is_integer() else self.t
        return torch.full((x_t.shape[0],), t, device=x_t.device)


@dataclass(frozen=True)
class Step:
    """One evaluation within a sampler's run: it stands at ``level`` and ``next`` comes after it.

    A solver that evaluates the network twice in a step makes two of these, and says so by
    ``evaluations``. So ``count`` is the number of evaluations, and ``next`` may be as noisy as
    ``level``.

    Example::

        grid = process.grid(50)
        first = Step(index=0, count=50, level=grid[0], next=grid[1])
    """

    index: int
    count: int
    level: NoiseLevel
    next: NoiseLevel
    evaluations: int = 1

    @property
    def number(self) -> int:
        """The number of the sampler's step, from 0: all its evaluations have the same."""
        return self.index // self.evaluations

    @property
    def progress(self) -> float:
        """The share of the run's evaluations that are done before this one, in [0, 1)."""
        return self.index / self.count


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of one noisy batch; immutable.

    Shapes: ``x_t``, ``v`` and ``variance_fraction`` are (b, c, h, w). ``variance_fraction`` places
    the log-variance of the reverse step between its lower bound (0, the posterior's) and its upper
    bound (1, beta's); the bounds depend on the length of the step, so the sampler finishes it
    (Nichol & Dhariwal 2021, equation 15). ``unclamped``, shape (b, c, h, w), is the part of ``v``
    that stays out when x_0 is clamped. ``attention`` maps the key of each capture to a layer's
    saliency (rows, n) or map (rows, k, n, n). ``x_0_only``, shape (b, c, h, w), is the part of
    ``v`` that moves x_0 alone: a sampler adds noise back as if it were not there (CFG++).

    Example::

        prediction = model.denoiser(x_t, level, labels)
        image, noise = prediction.x_0, prediction.eps
    """

    x_t: Images
    level: NoiseLevel
    v: Images
    variance_fraction: Images | None = None
    unclamped: Images | None = None
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    x_0_only: Images | None = None

    @property
    def x_0(self) -> Images:
        """The predicted clean image, x_0 = d_sigma x_t - sigma v."""
        return self.level.d_sigma * self.x_t - self.level.sigma * self.v

    @property
    def eps(self) -> Images:
        """The predicted noise, eps = -d_alpha x_t + alpha v."""
        return self.level.alpha * self.v - self.level.d_alpha * self.x_t

    def clamped(self, x_0_range: tuple[float, float] | None) -> Prediction:
        """Return the prediction whose x_0 is clamped and whose eps explains the same x_t.

        v = (d_sigma x_t - x_0) / sigma, with the clamped x_0. ``unclamped`` is taken out of v
        before, and added again afterwards. Only defined where sigma > 0, as at every step of a
        grid. With ``x_0_only``, eps is that of the rest of v, and x_t what the two then make,
        alpha x_0 + sigma eps: a step that starts at this x_t adds that noise back.
        """
        if self.x_0_only is not None:
            level, whole = self.level, replace(self, x_0_only=None)
            x_0 = whole.clamped(x_0_range).x_0
            eps = replace(whole, v=self.v - self.x_0_only).clamped(x_0_range).eps
            x_t = level.alpha * x_0 + level.sigma * eps
            v = level.d_alpha * x_0 + level.d_sigma * eps
            return replace(whole, x_t=x_t, v=v, unclamped=None)
        if x_0_range is None:
            return self
        if self.unclamped is not None:
            within = replace(self, v=self.v - self.unclamped, unclamped=None).clamped(x_0_range)
            return replace(self, v=within.v + self.unclamped)
        x_0 = self.x_0.clamp(*x_0_range)
        return replace(self, v=(self.level.d_sigma * self.x_t - x_0) / self.level.sigma)

    def in_one(self, after: NoiseLevel) -> Prediction:
        """Return the prediction without ``x_0_only`` whose step to ``after`` lands at the same x.

        A step of first order takes x_0 and eps from one v. With v + x_0_only (alpha sigma') /
        (alpha' sigma - alpha sigma') it lands where x_0 of v and the noise of the rest lead; primes
        mark the level after it, which is less noisy.
        """
        if self.x_0_only is None:
            return self
        back = float(self.level.alpha) * float(after.sigma)
        share = back / (float(after.alpha) * float(self.level.sigma) - back)
        return replace(self, v=self.v + share * self.x_0_only, x_0_only=None)

    def rows(self, start: int, stop: int) -> Prediction:
        """Return the same record for images ``start`` to ``stop``, without its attention."""
        fraction, unclamped, x_0_only = self.variance_fraction, self.unclamped, self.x_0_only
        return replace(
            self,
            x_t=self.x_t[start:stop],
            v=self.v[start:stop],
            variance_fraction=None if fraction is None else fraction[start:stop],
            unclamped=None if unclamped is None else unclamped[start:stop],
            x_0_only=None if x_0_only is None else x_0_only[start:stop],
            attention={},
        )


class Process(ABC):
    """A forward process: times, noise levels and grids of them.

    Example::

        process = model.denoiser.process
        x_t = process.add_noise(x_0, eps, process.level(500))
    """

    is_flow: ClassVar[bool] = False
    """Whether its curve is the straight line, along which an ODE of v is solved."""
    usual_kind: ClassVar[OutputKind] = "eps"
    """What networks mostly put out that are trained on it."""

    max_steps: int
    """The largest number of steps a grid can have."""

    @abstractmethod
    def level(self, t: float | Tensor) -> NoiseLevel:
        """Return the noise level at ``t``: a float, or one time per image of shape (b,)."""

    @abstractmethod
    def grid(self, steps: int) -> tuple[NoiseLevel, ...]:
        """Return ``steps`` levels of decreasing noise, followed by the clean level.

        Raises:
            ValueError: ``steps`` is not between 1 and ``max_steps``.
        """

    @abstractmethod
    def time_at(self, u: Tensor) -> Tensor:
        """Return the times at quantiles u in [0, 1) of the uniform distribution over times."""

    def elapsed(self, level: NoiseLevel) -> float:
        """Return the time of a level as a share of the noisiest: 0 is the image."""
        return float(level.sigma)

    def add_noise(self, x_0: Images, eps: Images, level: NoiseLevel) -> Images:
        """Noise a clean image: x_t = alpha x_0 + sigma eps."""
        return level.alpha * x_0 + level.sigma * eps

    def predict(
        self, x_t: Images, level: NoiseLevel, output: Images, kind: OutputKind
    ) -> Prediction:
        """Turn a network's output of any kind into a prediction.

        v = output; (eps + d_alpha x_t) / alpha; or (d_sigma x_t - x_0) / sigma. A score is -eps /
        sigma. Where alpha = 0 the output of an eps or score model says nothing of v, and where
        sigma = 0 that of an x_0 model does not.

        Raises:
            ValueError: another kind.
        """
        if kind == "v":
            v = output
        elif kind == "eps":
            v = (output + level.d_alpha * x_t) / level.alpha
        elif kind == "score":
            v = (level.d_alpha * x_t - level.sigma * output) / level.alpha
        elif kind == "x_0":
            v = (level.d_sigma * x_t - output) / level.sigma
        else:
            raise ValueError(f"kind={kind!r}: expected 'eps', 'v', 'x_0' or 'score'")
        return Prediction(x_t=x_t, level=level, v=v)

    def target(self, x_0: Images, eps: Images, level: NoiseLevel, kind: OutputKind) -> Images:
        """Return what a network of that kind should put out for the noised x_0."""
        if kind == "v":
            return level.d_alpha * x_0 + level.d_sigma * eps
        if kind == "score":
            return -eps / level.sigma
        return eps if kind == "eps" else x_0

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps that this process cannot take."""
        if not 1 <= steps <= self.max_steps:
            raise ValueError(
                f"steps={steps}: expected a whole number from 1 to {self.max_steps}, "
                f"the number of steps this process has"
            )
