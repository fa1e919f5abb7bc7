"""Feynman-Kac steering: particles that promise a high score multiply while they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.guidance import Cost
from sag_dit.noise import Lineage, generator
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Found, Request, Settings, Watch, draw, part_of
from sag_dit.search.verifier import CLASSIFIER, Judge, Verified, Verifier, check_count

Potential = Literal["max", "diff", "sum"]
PURPOSE = 2**32
"""Of the numbers that choose ancestors, far from those of guidance methods."""

Scores = Float64[NDArray[np.float64], "b k"]


@dataclass(frozen=True)
class FKSteering(Verified):
    """Feynman-Kac steering: draw each image as ``particles`` that are resampled along the way.

    After every ``every`` steps the verifier scores the x_0 that is predicted of each particle,
    decoded. With r_j the scores so far, j counting the times, a particle's weight is multiplied by
    its potential G, and with T the ``temperature``

        max: G = exp(max_j r_j / T)   sum: G = exp(sum_j r_j / T)   diff: G = exp((r_j - r_j-1) / T)

    Where the effective number of particles, (sum w)^2 / sum w^2, is below ``resample_below`` times
    their number, they are replaced by copies of themselves, drawn by weight, and weights are equal
    again: at 1 whenever any differ. Else the weights are kept for the next time. In the end the
    particle whose image scores best is kept. Copies part by the noise of the steps that follow, so
    the sampler has to draw some.

    A lower temperature steers harder; the authors' 1 / T is 10, with scores of about 1. They draw
    copies from the multinomial distribution; here they are drawn systematically, with one number
    for all particles of an image, which varies less, and changes nothing where weights are equal.

    Source: Singhal et al. 2025, arXiv 2501.06848, section 3 and algorithm 1.

    Raises:
        ValueError: a number out of range, an unknown potential; ``check`` refuses samplers whose
            steps draw no noise, and more particles than ``batch_size``.

    Example::

        sag_dit.sample(model, [3, 7], search=FKSteering(4, every=10), sampler=DDIM(eta=1.0))
    """

    key = "fk"

    particles: int = 4
    """How many particles each image has; all are drawn in one batch."""
    verifier: Verifier | str = CLASSIFIER
    """What scores images: classifier, or a function or module (images, condition) -> scores."""
    every: int = 5
    """Particles are scored and resampled after every so many steps."""
    temperature: float = 1.0
    """What scores are divided by; lower steers harder."""
    potential: Potential = "max"
    """What weighs a particle: its best score so far (max), their sum, or the gain (diff)."""
    resample_below: float = 1.0
    """Resample where the effective share of particles is lower; 1: whenever weights differ."""

    def __post_init__(self) -> None:
        check_count("particles", self.particles, least=2)
        check_count("every", self.every, least=1)
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"search.temperature={self.temperature}: expected more than 0")
        if self.potential not in get_args(Potential):
            raise ValueError(
                f"search.potential={self.potential!r}: expected {', '.join(get_args(Potential))}"
            )
        if not 0 <= self.resample_below <= 1:
            raise ValueError(f"search.resample_below={self.resample_below}: expected 0 to 1")

    def __str__(self) -> str:
        often = "step" if self.every == 1 else f"{self.every} steps"
        return f"{self.particles} particles steered by {self.told_verifier} every {often}"

    def check(self, model: Model, settings: Settings) -> None:
        """Refuse settings under which particles would not part; see :meth:`Search.check`."""
        sampler, size = settings.sampler, settings.batch_size
        if not sampler.steerable:
            name = getattr(sampler, "name", getattr(sampler, "key", type(sampler).__name__))
            raise ValueError(
                f"search={self.key}: with sampler={name} as it is set, copies of a particle would "
                f"not part; use one whose steps draw noise, as sampler=ddim sampler.eta=1, "
                f"sampler=ddpm, or for flows sampler=sde_flow, or search=best_of"
            )
        if self.particles > size:
            raise ValueError(
                f"search.particles={self.particles}: an image's particles are drawn in one batch, "
                f"and batch_size={size}; set batch_size={self.particles}, or fewer particles"
            )
        if self.every >= settings.steps:
            raise ValueError(
                f"search.every={self.every}: no particle would be resampled in "
                f"steps={settings.steps}; expected fewer, or search=best_of"
            )
        super().check(model, settings)

    def cost(self, alone: Cost) -> Cost:
        """Return the passes of all particles, which are scored at each time and in the end."""
        times = (len(alone.rows) - 1) // self.every + 1
        return replace(alone, particles=self.particles, scored=self.particles * times)

    def find(
        self, model: Model, requests: Sequence[Request], settings: Settings, watch: Watch | None
    ) -> tuple[UInt8[Tensor, "b c h w"], list[Found]]:
        """Draw the particles of as many images as fit a batch, and so on; see Search.find."""
        judge = self.judge(model, settings)
        size = settings.batch_size // self.particles
        groups = [requests[start : start + size] for start in range(0, len(requests), size)]
        images, found = list[Tensor](), list[Found]()
        for number, group in enumerate(groups):
            # A row for each particle, those of one image side by side.
            rows = [each.particle(k) for each in group for k in range(self.particles)]
            steering = Steering(self, judge, rows)
            told = part_of(watch, number, len(groups))
            drawn = draw(model, rows, settings, told, exchange=steering.exchange)
            # Of each image the particle that scores best.
            scores = judge(drawn, rows).reshape(len(group), self.particles)
            for place, own in enumerate(scores):
                row = place * self.particles + int(own.argmax())
                images.append(drawn[row])
                found.append(Found(float(own.max()), steering.lineages[row]))
        return torch.stack(images), found


class Steering:
    """What is known of the particles of one batch while it is drawn.

    ``rows`` are their requests, those of one image side by side. ``lineages`` says of each whose
    noise it is made of by now.

    Example::

        steering = Steering(FKSteering(4), judge, rows)
        draw(model, rows, settings, exchange=steering.exchange)
    """

    def __init__(self, how: FKSteering, judge: Judge, rows: Sequence[Request]) -> None:
        self.how, self.judge, self.rows = how, judge, rows
        self.lineages: list[Lineage] = [row.lineage for row in rows]
        shape = (len(rows) // how.particles, how.particles)
        self.log_weights = np.zeros(shape)
        # What the potential remembers of the scores before: nothing is below any maximum.
        self.before = np.full(shape, -np.inf if how.potential == "max" else 0.0)

    def exchange(self, step: SampleStep) -> Tensor | None:
        """Weigh the particles after a step, and return which one each goes on as."""
        done = step.step.index + 1
        if done % self.how.every or done == step.step.count:
            return None
        # Score the images that the network sees coming.
        denoiser, codec = self.judge.model.denoiser, self.judge.model.codec
        x_0 = step.prediction.clamped(denoiser.x_0_range).x_0[: len(self.rows)]
        scores = self.judge(codec.decode(x_0), self.rows).reshape(self.before.shape)
        log_potential, self.before = potential(scores, self.before, self.how)
        self.log_weights = self.log_weights + log_potential
        # Choose ancestors for each image by itself, from a stream of its own.
        ancestors = np.tile(np.arange(self.how.particles), (len(scores), 1))
        for place, own in enumerate(self.log_weights):
            weights = normalised(own)
            if 1 / (weights**2).sum() >= self.how.resample_below * self.how.particles:
                continue
            asked = self.rows[place * self.how.particles]
            stream = generator(asked.seed, asked.stream, done, PURPOSE)
            ancestors[place] = systematic(weights, stream.random())
            self.log_weights[place] = 0.0
        return self._follow(ancestors, draw=done + 1, size=len(step.x))

    def _follow(
        self, ancestors: Int64[NDArray[np.int64], "b k"], draw: int, size: int
    ) -> Tensor | None:
        """Note which particles go on as which, from this draw of noise on; return it by row."""
        self.before = np.take_along_axis(self.before, ancestors, axis=1)
        first = np.arange(len(ancestors))[:, None] * self.how.particles
        places = (first + ancestors).ravel().tolist()
        if places == [*range(len(places))]:
            return None
        # The steps that follow draw the noise of the place that a particle has now.
        for place, lineage in enumerate([self.lineages[each] for each in places]):
            number = place % self.how.particles
            goes_on = lineage if lineage[-1][1] == number else (*lineage, (draw, number))
            self.lineages[place] = goes_on
        # Rows that fill up the batch stay as they are.
        return torch.tensor([*places, *range(len(places), size)])


def potential(scores: Scores, before: Scores, how: FKSteering) -> tuple[Scores, Scores]:
    """Return the logarithm of each particle's potential, and what it remembers of the scores.

    Example:
        >>> now, before = np.array([[2.0, 1.0]]), np.array([[0.0, 3.0]])
        >>> potential(now, before, FKSteering(2, temperature=0.5))[0]
        array([[4., 6.]])
    """
    if how.potential == "diff":
        return (scores - before) / how.temperature, scores
    kept = np.maximum(scores, before) if how.potential == "max" else scores + before
    return kept / how.temperature, kept


def normalised(log_weights: Float64[NDArray[np.float64], "k"]) -> Float64[NDArray[np.float64], "k"]:
    """Return weights that sum to 1."""
    weights: NDArray[np.float64] = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    return weights


def systematic(
    weights: Float64[NDArray[np.float64], "k"], uniform: float
) -> Int64[NDArray[np.int64], "k"]:
    """Return the ancestors of k particles, in ascending order: particle i about k w_i times.

    Source: Kitagawa 1996; Douc & Cappe 2005, section 2.4.

    Example:
        >>> systematic(np.array([0.5, 0.0, 0.5, 0.0]), uniform=0.5).tolist()
        [0, 0, 2, 2]
    """
    count = len(weights)
    places = (uniform + np.arange(count)) / count
    chosen: NDArray[np.int64] = np.searchsorted(np.cumsum(weights), places, side="right")
    return np.minimum(chosen, count - 1)
