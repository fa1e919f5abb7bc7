"""The hunter of silent methods: it tries a term on a model, and says in words what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.guidance import GuidedDenoiser, HiGS, Question, Rewriting, SelfGuidance, Term
from sag_dit.guidance.cost import _Counting
from sag_dit.guidance.guided import Key
from sag_dit.guidance.term import Branch
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from tests.guidance.every import NOISE, batch, switched_off
from tests.guidance.reference import step_at

ROUNDING = 4e-6
"""A change is one where it is larger than this, relative to the prediction."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model is asked at one step of a run: noisy images, and what each is of."""

    model: Denoiser
    step: Step
    x: Tensor
    cond: Any
    noise: NoiseSource

    @classmethod
    def at(cls, model: Denoiser, index: int) -> Asked:
        """Three images of classes, at a step of ten."""
        return cls(model, step_at(model.process, index), *batch(), NOISE)

    def one(self, i: int) -> Asked:
        """The same of one image."""
        rows = slice(i, i + 1)
        cond = self.cond[rows] if isinstance(self.cond, Tensor) else self.cond.take(rows)
        noise = NoiseSource(self.noise.seeds[rows], self.noise.indices[rows])
        return replace(self, x=self.x[rows], cond=cond, noise=noise)

    def answer(self, terms: Sequence[Term], max_rows: int | None = None) -> Prediction:
        """What the model says, guided."""
        guided = GuidedDenoiser(self.model, terms, noise=self.noise, max_rows=max_rows)
        self.remind(guided)
        with torch.no_grad():
            return guided(self.x.clone(), self.step, self.cond)

    def remind(self, guided: GuidedDenoiser) -> None:
        """Show terms that go by earlier steps the step before."""
        if self.step.index and any(term.remembers for term in guided.terms):
            before = replace(self.step, index=self.step.index - 1)
            if isinstance(self.model, ClassConditional):
                before = step_at(self.model.process, before.index, before.count)
            with torch.no_grad():
                guided(1.1 * self.x, before, self.cond)

    def told(self, terms: Sequence[Term]) -> float:
        """The passes of one image that are told, of all networks together."""
        counting = _Counting(self.model, terms, noise=NoiseSource([0], [0]))
        counting.asked(torch.zeros_like(self.x[:1]), self.step)
        _, rows, others = counting.counts[0]
        return rows + others

    def acts(self, term: Term) -> bool:
        """Whether a term says that it does something at the step.

        A classifier's gradient has no weight at pure noise, where x_t knows nothing of the class.
        At the first step nothing lies before, and no time is noisier. HiGS has times of its own.
        """
        if "classifier" in term.needs and self.step.level.alpha == 0:
            return False
        if self.step.index == 0 and (term.remembers or isinstance(term, SelfGuidance)):
            return False
        if isinstance(term, HiGS):
            time = self.model.process.elapsed(self.step.level)
            return term.active(self.step) and term.t_min < time <= term.t_max
        if isinstance(term, Rewriting):
            base = Branch(self.model, self.x, self.cond)
            null = replace(base, cond=self.model.null(len(self.x)))
            question = Question(self.step, base, null, noise=self.noise)
            return term.active(self.step) and term.rewritten(question) is not question
        return term.active(self.step)


@contextmanager
def counted(model: Denoiser, terms: Sequence[Term]) -> Iterator[list[float]]:
    """The rows of every forward pass, of the model's network and of those that terms bring."""
    rows: list[float] = []
    image: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        # The first are whole images; a crop is its share of one.
        image.append(x[0].numel())
        rows.append(x.numel() / image[0])

    given = [model, *(getattr(term, each.name) for term in terms for each in fields(term))]
    with ExitStack() as undo:
        for each in given:
            network = each.network if isinstance(each, Denoiser) else each
            if isinstance(network, nn.Module):
                hook = network.register_forward_pre_hook(count, with_kwargs=True)
                undo.callback(hook.remove)
        yield rows


def differs(found: Tensor, expected: Tensor, within: float = 1e-4) -> bool:
    """Whether images differ by more than the rounding of another batch."""
    return bool((found - expected).abs().amax() > within * expected.abs().amax())


def _paid(asked: Asked, terms: Sequence[Term]) -> tuple[Prediction, list[float]]:
    """What the model says, guided, and the rows of each pass that it took."""
    guided = GuidedDenoiser(asked.model, terms, noise=asked.noise)
    asked.remind(guided)
    with counted(asked.model, terms) as rows, torch.no_grad():
        return guided(asked.x.clone(), asked.step, asked.cond), rows


def nothing(progress: float) -> float:
    """A schedule of no weight."""
    return 0.0


def faults(asked: Asked, term: Term) -> list[str]:
    """What is wrong with a term that is on; nothing where all is well."""
    found: list[str] = []
    count, plain = len(asked.x), asked.answer([])

    # On, it changes every image where it says that it acts, and else none.
    on, rows = _paid(asked, [term])
    if not on.v.isfinite().all():
        found.append("on, it is not finite")
    change = (on.v - plain.v).abs().flatten(1).amax(dim=1)
    if on.x_0_only is not None:
        change = change.maximum(on.x_0_only.abs().flatten(1).amax(dim=1))
    if not asked.acts(term):
        if change.any():
            found.append("where it says it rests, it changes images")
    elif not (change > ROUNDING * plain.v.abs().amax()).all():
        found.append("on, it leaves images as they are")

    # It costs what is told.
    if not math.isclose(sum(rows), count * asked.told([term])):
        found.append(f"on, it costs {sum(rows) / count:g} passes and is told to cost others")

    # It acts on its own rows alone: an image is what it is by itself, and so is a branch.
    if not torch.equal(on.x_t, asked.x):
        found.append("on, it changes the noisy image")
    alone = torch.cat([asked.one(i).answer([term]).v for i in range(count)])
    if differs(alone, on.v):
        found.append("on, an image depends on its neighbours")
    if differs(asked.answer([term], max_rows=count).v, on.v):
        found.append("on, one branch changes another's rows")

    # Off, outside its interval, and weighed by 0, it costs nothing and leaves every bit.
    resting_terms = {
        "off": switched_off(term),
        "outside its interval": replace(term, interval=(1.0, 1.0), interval_in="progress"),
    }
    with suppress(ValueError):  # CFG-Zero* takes no schedule beside steps that it zeroes.
        resting_terms["weighed by 0"] = replace(term, schedule=nothing)
    for name, rest in resting_terms.items():
        resting, rows = _paid(asked, [rest])
        if rows != [count]:
            found.append(f"{name}, it costs {sum(rows) / count:g} passes")
        if not torch.equal(resting.v, plain.v):
            found.append(f"{name}, it changes images")
    return found


class Recording(GuidedDenoiser):
    """Notes every question that is asked of a network, and counts the rounds."""

    def __init__(self, model: Denoiser, terms: Sequence[Term], max_rows: int | None = None) -> None:
        super().__init__(model, terms, noise=NOISE, max_rows=max_rows)
        self.asked: list[Key] = []
        self.rounds = 0

    def _evaluate(self, branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
        self.asked += [branch.key for branch in branches]
        self.rounds += bool(branches)
        return super()._evaluate(branches, step)


def discord(asked: Asked, terms: Sequence[Term]) -> list[str]:
    """What is wrong with a set of terms: its cost, or a difference one by one."""
    found: list[str] = []
    model, step, x, count = asked.model, asked.step, asked.x, len(asked.x)
    together, apart = Recording(model, terms), Recording(model, terms, max_rows=count)
    for each in (together, apart):
        asked.remind(each)
        each.asked.clear()
    with counted(model, terms) as rows:
        whole = together(given := x.clone(), step, asked.cond).v
    with counted(model, terms) as rows_apart:
        parts = apart(x.clone(), step, asked.cond).v
    if not torch.equal(given, x):
        found.append("the noisy image is changed")
    if len({*together.asked}) != len(together.asked):
        found.append("a question is asked twice")
    told = count * asked.told(terms)
    if not (math.isclose(sum(rows), told) and math.isclose(sum(rows_apart), told)):
        found.append(f"{sum(rows)} and {sum(rows_apart)} rows are paid, and {told} are told")
    if not whole.isfinite().all() or differs(parts, whole):
        found.append("together they are not what they are one by one")
    return found
