"""What a set of terms costs, told before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from sag_dit.attention import capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.caching import Cache
from sag_dit.guidance.guided import GuidedDenoiser, Key
from sag_dit.guidance.prefixes import rows_per_image
from sag_dit.guidance.term import Branch, Term
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.sampler import Sampler
from sag_dit.tensors import Images


@dataclass(frozen=True)
class Cost:
    """Network evaluations of each step: how many wait for one another, and rows of one image.

    ``others`` are rows of further networks: a worse model, a classifier. ``in_passes`` is what
    those of the network's own kind cost together, by their parameters, in passes of the network; a
    gradient counts twice.
    ``unlike`` counts those of another kind, which cannot be compared so. Rows that share the first
    blocks with others count as their share of the blocks, and rows that a cache continues as none.
    A search draws each image as so many ``particles``, and has so many images ``scored``.

    Example:
        >>> print(Cost(rounds=(2, 2), rows=(3, 2), others=(0, 0)))
        2.5 x unguided, 5 passes of the network for each image instead of 2
    """

    rounds: tuple[int, ...]
    rows: tuple[float, ...]
    others: tuple[float, ...]
    in_passes: float = 0.0
    unlike: int = 0
    particles: int = 1
    scored: int = 0

    @property
    def passes(self) -> float:
        """Passes of the network for each image, over the whole run."""
        return self.particles * (sum(self.rows) + self.in_passes)

    @property
    def relative(self) -> float:
        """The passes, over those of the same run without guidance: one an evaluation."""
        return self.passes / len(self.rows)

    def __str__(self) -> str:
        """Say it in one line."""
        passes = f"{round(self.passes, 1):g} passes of the network for each image"
        if self.relative != 1:
            passes = f"{round(self.relative, 2):g} x unguided, {passes} instead of {len(self.rows)}"
        others = self.particles * self.unlike
        passes += f" and {others} of another network" * (others > 0)
        return passes + f"; {self.scored} images scored to choose each" * (self.scored > 0)

    def plain(self) -> dict[str, float | int]:
        """Return the means over the run, and the number of steps."""
        count = len(self.rounds)
        searched = {"particles": self.particles, "scored": self.scored} if self.scored else {}
        return {
            **searched,
            "steps": count,
            "rounds_per_step": sum(self.rounds) / count,
            "rows_per_step": sum(self.rows) / count,
            "rows_of_others_per_step": sum(self.others) / count,
        }


@dataclass(frozen=True)
class Batches:
    """How many batches ``count`` images are drawn in: each is full, on each rank.

    Example:
        >>> Batches(20, size=16).number, Batches(20, size=16, ranks=4).number
        (2, 4)
    """

    count: int
    size: int
    ranks: int = 1

    @property
    def number(self) -> int:
        """The batches of all ranks."""
        share = -(-self.count // self.ranks)
        return self.ranks * -(-share // self.size)

    def padding(self) -> str:
        """Return what filling them up costs, in words; nothing where it is below 5 per cent."""
        full = self.number * self.size
        if full < 1.05 * self.count:
            return ""
        return (
            f"{self.count} image{'s' * (self.count > 1)} cost{'s' * (self.count == 1)} as much as "
            f"{full}: batches are always full; batch_size=1 costs less, its images differ in "
            f"rounding"
        )

    def twins(self, paired: int, cost: Cost, twins: Sequence[Cost]) -> str:
        """Return what the twins of ``paired`` of the images add to ``cost``, in words."""
        extra = replace(self, count=paired).number * sum(each.relative for each in twins)
        share = 100 * extra / (self.number * cost.relative)
        many = paired * len(twins)
        told = f"the {many} twins of the gallery add" if many > 1 else "the gallery's twin adds"
        return f"{told} {share:.0f} % to that; gallery.num=0 leaves them out"


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

    def __init__(self, model: Denoiser, terms: Sequence[Term], **known: Any) -> None:
        super().__init__(model, terms, **known)
        self.counts: list[list[float]] = []
        self.in_passes, self.unlike = 0.0, 0
        self.cond = some_condition(model)

    def asked(self, x_t: Images, step: Step) -> Prediction:
        """Count one evaluation of the sampler."""
        self.counts.append([0, 0, 0])
        return self(x_t, step, self.cond)

    def _evaluate(self, branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
        count = self.counts[-1]
        served = self._served(branches)
        computed = [branch for branch in branches if branch not in served]
        count[0] += bool(computed)
        for places in self._batches(computed):
            model = places[0].branch.model
            rows = rows_per_image(places)
            count[1 + (model is not self.model)] += rows
            if model is self.model:
                continue
            if type(model.network) is type(self.model.network):
                size = _num_parameters(model) / _num_parameters(self.model)
                self.in_passes += rows * model.passes * size
            else:
                self.unlike += round(rows)
        found = {branch.key: _nothing(branch, step) for branch in branches}
        if self._kept is not None:
            for branch in computed:
                self._kept.keep(branch, [], found[branch.key].attention)
        return found


def _num_parameters(model: Denoiser) -> int:
    return sum(each.numel() for each in model.network.parameters())


def _nothing(branch: Branch, step: Step) -> Prediction:
    """Return a prediction of zeros in which every token receives the same attention."""
    attention = {}
    for name, kind, heads in branch.captures:
        n = branch.model.layer(name).grid[0] * branch.model.layer(name).grid[1]
        shape = (1, n) if kind == "saliency" else (1, 1, n, n)
        attention[capture_key(name, kind, heads)] = torch.ones(shape)
    zeros = torch.zeros_like(branch.x_t)
    return Prediction(
        x_t=branch.x_t,
        level=branch.level or step.level,
        v=zeros,
        variance_fraction=zeros if getattr(branch.model.network, "learn_sigma", False) else None,
        attention=attention,
    )


def cost_of(
    model: Denoiser,
    terms: Sequence[Term],
    sampler: Sampler,
    steps: int,
    *,
    max_rows: int | None = None,
    share_prefixes: bool = False,
    cache: Cache | None = None,
) -> Cost:
    """Return what a run costs, by making it with a network that answers nothing.

    ``max_rows`` counts the rows of one image; it matters to ``share_prefixes`` alone.

    The sampler and the terms are the real ones, and draw one image of zeros. So intervals,
    schedules and questions that several terms share are counted as in a real run. Rows that a
    ``cache`` continues count nothing.

    Example::

        print(cost_of(model.denoiser, [CFG(1.5), SAG(0.5)], DDIM(), steps=50))
    """
    noise = NoiseSource([0], [0])
    counting = _Counting(
        model,
        terms,
        noise=noise,
        max_rows=max_rows,
        share_prefixes=share_prefixes,
        cache=cache,
    )
    x = torch.zeros(1, *model.latent_shape)
    with torch.no_grad():
        for _ in sampler.steps(counting.asked, x, model.process, steps, noise):
            pass
    rounds, rows, others = zip(*counting.counts, strict=True)
    return Cost(tuple(map(int, rounds)), rows, others, counting.in_passes, counting.unlike)
