"""GuidedDenoiser: runs all terms in lockstep, one batch per model and round."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sag_dit.attention import Capture, CaptureKind, Edit, capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.guidance.term import Asking, Branch, Question, Term
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.tensors import Images

Key = tuple[Any, ...]


def base_key(layer: str, kind: CaptureKind) -> str:
    """Return the name of what a caller of :class:`GuidedDenoiser` asked to read of the base."""
    return f"base/{capture_key(layer, kind)}"


@dataclass
class Talk:
    """One term's generator while it runs: what it asks now, and in the end its contribution.

    ``read`` is what it captured on the way.

    Example::

        talk = Talk(term, term.contribution(question))
        talk.tell(None)  # now talk.wants is what the term asks
    """

    term: Term
    asking: Asking
    wants: tuple[Branch, ...] = ()
    contribution: Tensor | None = None
    read: dict[str, Tensor] = field(default_factory=dict)

    def tell(self, answers: tuple[Prediction, ...] | None) -> None:
        """Answer the term's questions and note its next ones, or what it returns.

        A question of no branches is answered at once.

        Raises:
            ValueError: the method is no generator, or asks something that is no tuple of branches.
        """
        name = f"{type(self.term).__name__}.contribution"
        if not isinstance(self.asking, Generator):
            raise ValueError(
                f"{name} returned a {type(self.asking).__name__}: expected a generator, which asks "
                f"by base, = yield (ask.base,) and returns its contribution"
            )
        for branch, answer in zip(self.wants, answers or (), strict=True):
            for capture in branch.captures:
                key = capture_key(*capture)
                self.read.setdefault(key, answer.attention[key])
        try:
            self.wants = next(self.asking) if answers is None else self.asking.send(answers)
            while not self.wants:
                self.wants = self.asking.send(())
        except StopIteration as stop:
            self.wants, self.contribution = (), stop.value
        asked: object = self.wants
        if not isinstance(asked, tuple) or {*map(type, asked)} - {Branch}:
            raise ValueError(
                f"{name} asked a {type(asked).__name__}: expected a tuple of branches, such as "
                f"(ask.base,)"
            )

    def contribution_to(self, v: Images) -> Images:
        """Return what the term contributes.

        Raises:
            ValueError: it returned nothing, or something of another shape: a silent no-op.
        """
        if self.contribution is None or self.contribution.shape != v.shape:
            found = getattr(self.contribution, "shape", None)
            raise ValueError(
                f"{type(self.term).__name__} returned "
                f"{'nothing' if found is None else tuple(found)}: expected a contribution to v of "
                f"shape {tuple(v.shape)}"
            )
        return self.contribution


class GuidedDenoiser:
    """A denoiser with guidance: base prediction + the contributions of all active terms.

    One instance serves one run over one batch of images, since terms may remember what happened at
    earlier steps. Each round gathers what all terms ask, drops duplicates, merges captures and
    evaluates one batch per model, split between branches so that it has at most ``max_rows`` rows.
    Questions that do not depend on an earlier answer are asked in the same round, so CFG and SAG
    together take two calls of the network instead of three.

    The variance comes from the base branch alone, which is asked about the image as it is. The
    answer's ``attention`` holds what the terms read, so that a caller can show what they saw. If
    two terms read the same layer, it holds what the first one read. What the caller itself captures
    of the base stands under names of its own, :func:`base_key`.

    Example::

        guided = GuidedDenoiser(model.denoiser, [CFG(1.5), SAG(0.5)], max_rows=64)
        prediction = guided(x_t, step, labels)
    """

    def __init__(
        self,
        model: Denoiser,
        terms: Sequence[Term] = (),
        *,
        noise: NoiseSource | None = None,
        max_rows: int | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected 1 or more, or null for no bound")
        self.model = model
        self.terms = tuple(term for term in terms if not term.off)
        for term in self.terms:
            term.check(model)
        self._noise = noise
        self._max_rows = max_rows
        self._memory: tuple[dict[str, Any], ...] = tuple({} for _ in self.terms)

    def __call__(
        self,
        x_t: Images,
        step: Step,
        cond: Condition,
        captures: Sequence[tuple[str, CaptureKind]] = (),
    ) -> Prediction:
        """Return the guided prediction at ``x_t``; ``captures`` are read from the base besides."""
        # What every term is told: the given condition, the null condition, and whether CFG is on.
        base = Branch(self.model, x_t, cond)
        shown = base
        for layer, kind in captures:
            shown = shown.capturing(layer, kind)
        null = self.model.null(x_t.shape[0])
        active = [i for i, term in enumerate(self.terms) if term.active(step)]
        question = Question(
            step=step,
            base=base,
            null=None if null is None else replace(base, cond=null),
            guided_by_cfg=any(self.terms[i].from_null for i in active),
            noise=self._noise,
        )
        # Start the active terms. Each asks its first questions.
        talks = [
            Talk(
                self.terms[i],
                self.terms[i].contribution(replace(question, memory=self._memory[i])),
            )
            for i in active
        ]
        for talk in talks:
            talk.tell(None)
        # Answer in rounds: all that the terms want now is one batch per model; the answers lead the
        # terms to their next questions, until none has any.
        answers: dict[Key, Prediction] = {}
        # Every branch of the step is kept alive here: an answer's key holds the ids of its tensors.
        asked: list[Branch] = [shown]
        wanted = [shown, *(branch for talk in talks for branch in talk.wants)]
        while wanted:
            asked += wanted
            for key, answer in self._evaluate(_merged(wanted, answers), step).items():
                # Asked once more for a further capture, a branch keeps its first answer.
                known = answers.get(key, answer)
                read = {**known.attention, **answer.attention}
                answers[key] = replace(known, attention=read)
            for talk in talks:
                if talk.wants:
                    talk.tell(tuple(answers[branch.key] for branch in talk.wants))
            wanted = [branch for talk in talks for branch in talk.wants]
        # Add the contributions, in the order of the terms.
        result = answers[base.key]
        v, unclamped = result.v, None
        for talk in talks:
            contribution = talk.term.weight(step) * talk.contribution_to(result.v)
            v = v + contribution
            if not talk.term.clamped:
                unclamped = contribution if unclamped is None else unclamped + contribution
        # Hand on what was read: the caller's own captures, and what the terms saw.
        attention = {
            base_key(layer, kind): result.attention[capture_key(layer, kind)]
            for layer, kind, _ in shown.captures
        }
        for talk in reversed(talks):
            attention |= talk.read
        return replace(result, v=v, unclamped=unclamped, attention=attention)

    def _evaluate(self, branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
        """Answer distinct branches, one batch per model and chunk of ``max_rows``."""
        by_model: dict[int, list[Branch]] = {}
        for branch in branches:
            by_model.setdefault(id(branch.model), []).append(branch)
        answers: dict[Key, Prediction] = {}
        for group in by_model.values():
            for chunk in self._chunks(group):
                answers |= _evaluate_together(chunk, step)
        return answers

    def _chunks(self, branches: list[Branch]) -> list[list[Branch]]:
        if self._max_rows is None:
            return [branches]
        rows = branches[0].x_t.shape[0]
        if self._max_rows < rows:
            raise ValueError(
                f"max_rows={self._max_rows}: expected at least the batch, {rows} rows; make "
                f"batch_size smaller instead"
            )
        per_chunk = self._max_rows // rows
        return [branches[i : i + per_chunk] for i in range(0, len(branches), per_chunk)]


def _merged(wanted: Sequence[Branch], answers: Mapping[Key, Prediction]) -> list[Branch]:
    """Drop questions already answered or asked twice; what is captured is united.

    A branch whose answer lacks a capture that is wanted only now is asked once more.
    """
    merged: dict[Key, Branch] = {}
    for branch in wanted:
        known = answers.get(branch.key)
        keys = {capture_key(*capture) for capture in branch.captures}
        if known is not None and keys <= set(known.attention):
            continue
        before = merged.get(branch.key, branch)
        captures = dict.fromkeys((*before.captures, *branch.captures))
        merged[branch.key] = replace(branch, captures=tuple(captures))
    return list(merged.values())


def _evaluate_together(branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
    """Evaluate branches of one model as one batch and cut the answer apart."""
    # Give each branch its own rows of the batch, and aim its captures and edits at them.
    model = branches[0].model
    size = branches[0].x_t.shape[0]
    captures: list[Capture] = []
    edits: list[tuple[Edit, slice]] = []
    for i, branch in enumerate(branches):
        rows = slice(i * size, (i + 1) * size)
        captures += [
            Capture(model.layer(name), rows, kind, f"{i}/{capture_key(name, kind, heads)}", heads)
            for name, kind, heads in branch.captures
        ]
        edits += [(edit, rows) for edit in branch.edits]
    # Evaluate all at once. A single branch keeps its own tensors, without a copy.
    if len(branches) == 1:
        x_t, cond = branches[0].x_t, branches[0].cond
    else:
        x_t = torch.cat([branch.x_t for branch in branches])
        cond = model.join([branch.cond for branch in branches])
    answer = model(x_t, step.level, cond, captures, edits)
    # Cut the rows apart again, each with its own x_t and what was captured of it.
    return {
        branch.key: replace(
            answer.rows(i * size, (i + 1) * size),
            x_t=branch.x_t,
            attention={
                capture_key(*capture): answer.attention[f"{i}/{capture_key(*capture)}"]
                for capture in branch.captures
            },
        )
        for i, branch in enumerate(branches)
    }
