"""GuidedDenoiser: runs all terms in lockstep, one batch per model, noise level and round."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sag_dit.attention import Capture, CaptureKind, Edit, capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.guidance.caching import Cache, Kept, continued, recorded
from sag_dit.guidance.prefixes import Place, number_at, places_of, together
from sag_dit.guidance.term import Asking, Branch, Contribution, Question, Term
from sag_dit.models.network import Fork
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.profiling import part
from sag_dit.tensors import Images

Key = tuple[Any, ...]


def base_key(layer: str, kind: CaptureKind) -> str:
    """Return the name of what a caller of :class:`GuidedDenoiser` asked to read of the base."""
    return f"base/{capture_key(layer, kind)}"


@dataclass(frozen=True, eq=False)
class Held:
    """What a term contributed last, of which step that was, what it had read, and its base edits.

    Example::

        held = Held(step.number, contribution, talk.read)
    """

    number: int
    contribution: Contribution
    read: Mapping[str, Tensor]


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
    contribution: Tensor | Contribution | None = None
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

    def contribution_to(self, v: Images) -> Contribution:
        """Return what the term contributes.

        Raises:
            ValueError: it returned nothing, or something of another shape: a silent no-op. Or a
                part of it moves x_0 alone, and the term does not say so.
        """
        given, name = self.contribution, type(self.term).__name__
        if not isinstance(given, Contribution):
            given = Contribution(given)  # type: ignore[arg-type] # What it is, is looked at below.
        for each in (given.v, v if given.x_0_only is None else given.x_0_only):
            found = getattr(each, "shape", None)
            if found != v.shape:
                raise ValueError(
                    f"{name} returned {'nothing' if found is None else tuple(found)}: expected a "
                    f"contribution to v of shape {tuple(v.shape)}"
                )
        if given.x_0_only is not None and not self.term.renoises:
            raise ValueError(
                f"{name} returned a part that moves x_0 alone: write renoises = True in the class, "
                f"so that samplers that cannot do that are refused"
            )
        return given


class GuidedDenoiser:
    """A denoiser with guidance: base prediction + the contributions of all active terms.

    One instance serves one run over one batch of images, since terms may remember what happened at
    earlier steps. Each round gathers what all terms ask, drops duplicates, merges captures and
    evaluates one batch per model, noise level and size of image, split between branches so that it
    has at most ``max_rows`` rows. Questions that do not depend on an earlier answer are asked in
    the same round, so CFG and SAG together take two calls of the network instead of three. With
    ``share_prefixes``, branches of a batch that differ from a block on share the blocks before it,
    see :mod:`.prefixes`. With a ``cache`` the blocks run at some of the steps only, see
    :class:`.Cache`.

    Terms that act on the guided prediction (``on_guided``) come after all others. Each of them is
    given the same one, base and others summed up, so that their order does not matter.

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
        share_prefixes: bool = False,
        cache: Cache | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected 1 or more, or null for no bound")
        self.model = model
        self.terms = tuple(term for term in terms if not term.off)
        for term in self.terms:
            term.check(model)
        cache = cache or Cache()
        cache.check(model, share_prefixes)
        self._kept = None if cache.off else Kept(cache)
        self._beat = cache.beat
        self._noise = noise
        self._max_rows = max_rows
        self._share = share_prefixes
        self._memory: tuple[dict[str, Any], ...] = tuple({} for _ in self.terms)
        self._held: dict[int, Held] = {}

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
        null = self.model.null(x_t.shape[0])
        active = [i for i, term in enumerate(self.terms) if term.active(step)]
        question = Question(
            step=step,
            base=base,
            null=None if null is None else replace(base, cond=null),
            guided_by_cfg=any(self.terms[i].from_null for i in active),
            noise=self._noise,
        )
        # Some methods change what all are told, the base among it.
        for i in active:
            question = self.terms[i].rewritten(question)
        base = shown = question.base
        for layer, kind in captures:
            shown = shown.capturing(layer, kind)
        # Ask the active terms, but for those that hold what they contributed before. Those that
        # remember are told of every step.
        asks = {i for i in active if self._asks(i, step)}
        told = [i for i, term in enumerate(self.terms) if term.remembers or i in asks]
        answers, wanted, number = dict[Key, Prediction](), [shown], 0
        kept, apart = self._kept, False
        # Every branch of the step is kept alive here: an answer's key holds the ids of its tensors.
        asked: list[Branch] = []
        guided: Prediction | None = None
        # First come the terms that act on what models say, then those that act on the sum.
        for on_guided in (False, True):
            talks = {
                i: Talk(
                    self.terms[i],
                    self.terms[i].contribution(
                        replace(question, memory=self._memory[i], sum_of_others=guided)
                    ),
                )
                for i in told
                if self.terms[i].on_guided is on_guided
            }
            for talk in talks.values():
                talk.tell(None)
            if kept is not None and on_guided:
                kept.hear(_wants(talks))
            elif kept is not None and kept.begin(question, _wants(talks), {*told}) and captures:
                # Where blocks are not computed, what the caller reads is asked apart below.
                wanted, apart = [base], True
            number = self._answer(talks, wanted, asked, answers, step, number)
            wanted = []
            # Keep what each contributes, and add it up in the order of the terms.
            result = answers[base.key] if guided is None else guided
            for i, talk in talks.items():
                added = talk.contribution_to(result.v)
                if i in asks:
                    self._held[i] = Held(step.number, added, talk.read)
            acting = [i for i in active if self.terms[i].on_guided is on_guided]
            guided = self._added_up(result, acting, step)
        assert guided is not None
        # Hand on what was read: the caller's own captures, and what the terms saw.
        seen = _evaluate_together([Place(shown)], step)[base.key] if apart else guided
        attention = {
            base_key(layer, kind): seen.attention[capture_key(layer, kind)]
            for layer, kind, _ in shown.captures
        }
        for i in reversed(active):
            attention |= self._held[i].read
        return replace(guided, attention=attention)

    def _answer(
        self,
        talks: Mapping[int, Talk],
        wanted: Sequence[Branch],
        asked: list[Branch],
        answers: dict[Key, Prediction],
        step: Step,
        number: int,
    ) -> int:
        """Answer what terms ask, and ``wanted`` beside it; return the number of the last round.

        All that they want now is one batch per model; the answers lead the terms to their next
        questions, until none has any.
        """
        wanted = [*wanted, *(each for asked in _wants(talks).values() for each in asked)]
        while wanted:
            asked += wanted
            number += 1
            with part("guidance", label=f"round {number}"):
                evaluated = self._evaluate(_merged(wanted, answers), step)
            for key, answer in evaluated.items():
                # Asked once more for a further capture, a branch keeps its first answer.
                known = answers.get(key, answer)
                read = {**known.attention, **answer.attention}
                answers[key] = replace(known, attention=read)
            for talk in talks.values():
                if talk.wants:
                    talk.tell(tuple(answers[branch.key] for branch in talk.wants))
            wanted = [branch for talk in talks.values() for branch in talk.wants]
            if self._kept is not None:
                self._kept.hear(_wants(talks))
        return number

    def _added_up(self, result: Prediction, acting: Sequence[int], step: Step) -> Prediction:
        """Return a prediction with what terms contribute, by their numbers."""
        v, unclamped, x_0_only = result.v, result.unclamped, result.x_0_only
        for i in acting:
            weight, held = self.terms[i].weight(step), self._held[i].contribution
            contribution = weight * held.v
            v = v + contribution
            if not self.terms[i].clamped:
                unclamped = _sum(unclamped, contribution)
            if held.x_0_only is not None:
                x_0_only = _sum(x_0_only, weight * held.x_0_only)
        return replace(result, v=v, unclamped=unclamped, x_0_only=x_0_only)

    def exchange(self, rows: Tensor) -> None:
        """Let row i go on as row ``rows[i]``: what is remembered and held follows the images.

        Raises:
            ValueError: a term remembers a tensor that has no row for each image.
        """
        for i, term in enumerate(self.terms):
            name = type(term).__name__
            for key, value in self._memory[i].items():
                self._memory[i][key] = _exchanged(value, rows, name)
            if i in self._held:
                self._held[i] = _exchanged(self._held[i], rows, name)
        if self._kept is not None:
            self._kept.slots = _exchanged(self._kept.slots, rows, "cache")

    def _asks(self, i: int, step: Step) -> bool:
        """Whether a term asks at this step: on the common beat, or as it holds nothing recent."""
        held, every = self._held.get(i), self.terms[i].every
        return (
            held is None
            or not 0 < step.number - held.number < every
            or (step.number - self._beat) % every == 0
        )

    def _evaluate(self, branches: Sequence[Branch], step: Step) -> dict[Key, Prediction]:
        """Answer distinct branches, batch by batch."""
        answers: dict[Key, Prediction] = {}
        served = self._served(branches)
        for places in self._batches(served):
            with part("guidance", label="continued"):
                answers |= _evaluate_together(places, step, self._kept, serve=True)
        for places in self._batches([each for each in branches if each not in served]):
            answers |= _evaluate_together(places, step, self._kept)
        return answers

    def _served(self, branches: Sequence[Branch]) -> list[Branch]:
        """Return the branches whose blocks need not run, since the cache continues them."""
        return [each for each in branches if self._kept is not None and self._kept.serves(each)]

    def _batches(self, branches: Sequence[Branch]) -> list[list[Place]]:
        """Lay distinct branches out: one batch per model, level, size, and ``max_rows``."""
        alike: dict[Key, list[Branch]] = {}
        for branch in branches:
            kin = (branch.level, branch.x_t.shape, branch.model.kin(branch.cond))
            alike.setdefault((id(branch.model), *kin), []).append(branch)
        groups = (together(each) if self._share else each for each in alike.values())
        return [places_of(chunk, self._share) for group in groups for chunk in self._chunks(group)]

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


def _sum(before: Images | None, more: Images) -> Images:
    return more if before is None else before + more


def _exchanged(value: Any, rows: Tensor, name: str) -> Any:
    """Return what a term remembers with the rows of every tensor in it exchanged."""
    if isinstance(value, Tensor) and value.ndim:
        if len(value) != len(rows):
            raise ValueError(
                f"{name} remembers a tensor {tuple(value.shape)} that has no row for each of the "
                f"{len(rows)} images, so a search cannot exchange them; leave {name} out, or use "
                f"search=best_of"
            )
        return value[rows.to(value.device)]
    if isinstance(value, Mapping):
        return {key: _exchanged(each, rows, name) for key, each in value.items()}
    if isinstance(value, (list, deque)):
        made = type(value)(value)
        for place, each in enumerate(value):
            made[place] = _exchanged(each, rows, name)
        return made
    if type(value) is tuple:
        return tuple(_exchanged(each, rows, name) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        return replace(value, **{key: _exchanged(part, rows, name) for key, part in parts.items()})
    return value


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


def _wants(talks: Mapping[int, Talk]) -> dict[int, tuple[Branch, ...]]:
    """Return what each term asks now."""
    return {i: talk.wants for i, talk in talks.items()}


def _evaluate_together(
    places: Sequence[Place], step: Step, kept: Kept | None = None, serve: bool = False
) -> dict[Key, Prediction]:
    """Evaluate branches of one model and level as one batch and cut the answer apart.

    ``kept`` keeps what the blocks put out. With ``serve`` it says so instead, and no block runs.
    """
    model, level = places[0].branch.model, places[0].branch.level or step.level
    size = places[0].branch.x_t.shape[0]

    def rows(number: int) -> slice:
        return slice(number * size, (number + 1) * size)

    # Give each branch its own rows of the batch, and aim its captures and edits at them. Before
    # they have joined, its captures read the rows that they are copies of, which are edited alike.
    captures: list[Capture] = []
    edits: list[tuple[Edit, slice]] = []
    for i, place in enumerate(places):
        captures += [
            Capture(
                model.layer(name),
                rows(number_at(places, i, name)),
                kind,
                f"{i}/{capture_key(name, kind, heads)}",
                heads,
            )
            for name, kind, heads in place.branch.captures
        ]
        edits += [
            (edit, rows(i)) for edit in place.branch.edits if number_at(places, i, edit.module) == i
        ]
    forks = [Fork(each.block, rows(each.source)) for each in places if each.source is not None]
    # Evaluate all at once. A single branch keeps its own tensors, without a copy.
    first = [place.branch for place in places if place.source is None]
    if len(first) == 1:
        x_t, cond = first[0].x_t, first[0].cond
    else:
        x_t = torch.cat([branch.x_t for branch in first])
        cond = model.join([branch.cond for branch in first])
    # Denoisers that cannot fork, or keep what blocks put out, know no such argument.
    further: dict[str, Any] = {"forks": forks} if forks else {}
    outputs: list[list[Tensor]] = []
    if kept is not None and serve:
        captures, edits = [], [(edit, each) for edit, each in edits if continued(edit)]
        further["outputs"] = kept.outputs([place.branch for place in places])
    elif kept is not None and model.keeps_outputs:
        further["outputs"] = recorded(outputs)
    answer = model(x_t, level, cond, captures, edits, **further)
    # Cut the rows apart again, each with its own x_t and what was captured of it.
    answers: dict[Key, Prediction] = {}
    for i, place in enumerate(places):
        branch = place.branch
        if kept is not None and serve:
            attention = kept.attention(branch)
        else:
            keys = [capture_key(*capture) for capture in branch.captures]
            attention = {key: answer.attention[f"{i}/{key}"] for key in keys}
        if outputs:
            assert kept is not None
            kept.keep(branch, [[each[rows(i)] for each in parts] for parts in outputs], attention)
        own = answer.rows(i * size, (i + 1) * size)
        answers[branch.key] = replace(own, x_t=branch.x_t, attention=attention)
    return answers
