"""What a set of terms costs, told before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch

from sag_dit.attention import capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.guided import GuidedDenoiser, Key
from sag_dit.guidance.term import Branch, Term
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.sampler import Sampler
from sag_dit.tensors import Images


@dataclass(frozen=True)
class Cost:
    """Network evaluations of each step: how many wait for one another, and rows of one image.

    ``others`` are rows of further networks: a worse model, a classifier.

    Example:
        >>> print(Cost(rounds=(2, 2), rows=(3, 2), others=(0, 0)))
        2 rounds, 2.5 (at most 3) rows per image and step
    """

    rounds: tuple[int, ...]
    rows: tuple[int, ...]
    others: tuple[int, ...]

    def __str__(self) -> str:
        """Say it in one line; where steps differ, as a mean and the most."""
        further = (
            f" and {_mean_and_most(self.others)} of further networks" if any(self.others) else ""
        )
        rounds = f"{_mean_and_most(self.rounds)} round{'s' * (max(self.rounds) > 1)}"
        rows = f"{_mean_and_most(self.rows)} row{'s' * (max(self.rows) > 1)}"
        return f"{rounds}, {rows}{further} per image and step"

    def plain(self) -> dict[str, float | int]:
        """Return the means over the run, and the number of steps."""
        count = len(self.rounds)
        return {
            "steps": count,
            "rounds_per_step": sum(self.rounds) / count,
            "rows_per_step": sum(self.rows) / count,
            "rows_of_others_per_step": sum(self.others) / count,
        }


def _mean_and_most(counts: Sequence[int]) -> str:
    if min(counts) == max(counts):
        return str(counts[0])
    return f"{sum(counts) / len(counts):.4g} (at most {max(counts)})"


def some_condition(model: Denoiser) -> Condition:
    """Return a condition that terms may look at: the first class, or a text model's null prompt.

    A text model that knows no null prompt is asked with its first one; within a pipeline, which
    brings its prompts later, with None.
    """
    if not isinstance(model, TextConditional):
        return model.conditions([0])
    null = model.null(1)
    if null is not None:
        # As a copy, since two questions about one condition are asked once.
        return copy(null)
    return model.conditions([0]) if model.class_names else None


class _Counting(GuidedDenoiser):
    """Runs the terms as in a real run, but answers with zeros instead of asking a network."""

    def __init__(self, model: Denoiser, terms: Sequence[Term], noise: NoiseSource) -> None:
        super().__init__(model, terms, noise=noise)
        self.counts: list[list[int]] = []
        self.cond = some_condition(model)

    def asked(self, x_t: Images, step: Step) -> Prediction:
        """Count one evaluation of the sampler."""
        self.counts.append([0, 0, 0])
        return self(x_t, step, self.cond)

    def _evaluate(self, branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
        own = sum(branch.model is self.model for branch in branches)
        count = self.counts[-1]
        count[0] += bool(branches)
        count[1] += own
        count[2] += len(branches) - own
        return {branch.key: _nothing(branch, step) for branch in branches}


def _nothing(branch: Branch, step: Step) -> Prediction:
    """Return a prediction of zeros in which every token receives the same attention."""
    attention = {}
    for name, kind, heads in branch.captures:
        n = branch.model.layer(name).grid[0] * branch.model.layer(name).grid[1]
        shape = (1, n) if kind == "saliency" else (1, 1, n, n)
        attention[capture_key(name, kind, heads)] = torch.ones(shape)
    zeros = torch.zeros_like(branch.x_t)
    return Prediction(x_t=branch.x_t, level=step.level, v=zeros, attention=attention)


def cost_of(model: Denoiser, terms: Sequence[Term], sampler: Sampler, steps: int) -> Cost:
    """Return what a run costs, by making it with a network that answers nothing.

    The sampler and the terms are the real ones, and draw one image of zeros. So intervals,
    schedules and questions that several terms share are counted as in a real run.

    Example::

        print(cost_of(model.denoiser, [CFG(1.5), SAG(0.5)], DDIM(), steps=50))
    """
    noise = NoiseSource([0], [0])
    counting = _Counting(model, terms, noise)
    x = torch.zeros(1, *model.latent_shape)
    with torch.no_grad():
        for _ in sampler.steps(counting.asked, x, model.process, steps, noise):
            pass
    rounds, rows, others = zip(*counting.counts, strict=True)
    return Cost(rounds, rows, others)
