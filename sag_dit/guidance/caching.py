"""Caches across steps: what the blocks put out at one step serves at the steps after it.

From one step to the next the outputs of attention and MLP change little. So they are computed at
every so many steps. Between them each is taken over (FORA), or continued as a Taylor series through
its last values (TaylorSeer), and only embeddings, modulations and the last layer run. Each question
that guidance asks keeps its own outputs, and never reads another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sag_dit.attention import AttentionEdit, Edit, capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.prefixes import CHAIN, block_number
from sag_dit.guidance.term import Branch, Question, check_number

Asker: TypeAlias = tuple[int, ...]
"""Who asks: the number of the term, of its question, and of the branch in the question."""
LastingName: TypeAlias = tuple[int, str, Asker, tuple[Edit, ...]]
"""A branch at any step: its model, its condition, whose image it is of, and its edits."""


@dataclass(frozen=True)
class Cache:
    """Compute the blocks at every so many steps; between them continue what they put out before.

    With ``order`` 0 each output of attention and MLP is taken over from the last step that computed
    it. With order m it is sum_k d_k j^k / k! over k up to m, j steps later, where d_0 is the output
    and d_k the difference of the last two d_(k-1) over the steps between them. Orders above 0
    compute the first two steps. ``every`` 1 is off.

    A method whose first active step lies between has that step computed too, with an order above 0
    also the step after it. So has a question that was not asked before: of another condition, or
    with an edit that holds tensors.
    Attention is read where it is computed, and taken over in between. The evaluations of a step
    keep apart.

    Source: FORA, Selvaraju et al. 2024, arXiv 2407.01425 (order 0); TaylorSeer, Liu et al. 2025,
    arXiv 2503.06923.

    Raises:
        ValueError: ``every`` below 1, or ``order`` outside 0 to 4.

    Example::

        images = model.sample([3, 7], guidance=CFG(1.5), cache=Cache(every=2, order=1))
    """

    every: int = 1
    order: int = 0

    def __post_init__(self) -> None:
        check_number("cache.every", int, self.every)
        check_number("cache.order", int, self.order)
        if self.every < 1:
            raise ValueError(f"cache.every={self.every}: expected 1 or more steps; 1 is off")
        if not 0 <= self.order <= 4:
            raise ValueError(f"cache.order={self.order}: expected 0 to 4")

    @property
    def off(self) -> bool:
        """Whether every step is computed."""
        return self.every == 1

    @property
    def beat(self) -> int:
        """The step from which every so many are computed; those before it are computed as well."""
        return 1 if self.order and not self.off else 0

    def check(self, model: Denoiser, share_prefixes: bool = False) -> None:
        """Refuse a model whose blocks cannot be cached, and shared prefixes beside.

        Raises:
            ValueError: one of both.
        """
        if self.off:
            return
        if share_prefixes:
            raise ValueError(
                f"cache.every={self.every} beside share_prefixes=true: blocks that rows share keep "
                f"no outputs of each row; choose one of the two"
            )
        if not model.keeps_outputs:
            raise ValueError(
                f"cache.every={self.every}: a {type(model.network).__name__} cannot keep what its "
                f"blocks put out; expected a DiT or SiT, or cache.every=1"
            )


@dataclass(frozen=True, eq=False)
class KeptOutputs:
    """What one branch keeps of a step: outputs by order, block and part, and attention it read.

    Example::

        attended = entry.at(step.number, block=3)[0]
    """

    number: int
    orders: Sequence[Sequence[Sequence[Tensor]]]
    attention: Mapping[str, Tensor]

    def at(self, number: int, block: int) -> list[Tensor]:
        """Return what the parts of a block put out at a step, by the Taylor series."""
        found = [*self.orders[0][block]]
        for k, derivative in enumerate(self.orders[1:], start=1):
            factor = (number - self.number) ** k / math.factorial(k)
            found = [
                torch.add(x, d, alpha=factor) for x, d in zip(found, derivative[block], strict=True)
            ]
        return found


@dataclass
class Slot:
    """One evaluation of the sampler's steps: which step was computed last, and what it left.

    ``asking`` are the terms that asked at that step, ``ready`` those of them that can be continued:
    with an order above 0 they asked at the computed step before as well. ``before`` is what that
    one left.

    Example::

        slot = Slot(step.number, asking={0, 1}, ready={0})
    """

    number: int
    asking: Set[int]
    ready: Set[int]
    entries: dict[LastingName, KeptOutputs] = field(default_factory=dict)
    before: dict[LastingName, KeptOutputs] = field(default_factory=dict)


class Kept:
    """What one run keeps of its branches, and which of them are computed at a step.

    A step is computed or continued as a whole, so that guidance compares outputs of the same age.

    Example::

        kept = Kept(Cache(every=2))
        kept.begin(question, {0: (question.base, worse)}, asking={0})
        kept.serves(worse)
    """

    def __init__(self, how: Cache) -> None:
        self._how = how
        self.slots: dict[int, Slot] = {}

    def begin(
        self, question: Question, first: Mapping[int, Sequence[Branch]], asking: Set[int]
    ) -> bool:
        """Begin an evaluation with the first questions of terms, and return if it is continued.

        ``asking`` are all the terms that ask at this evaluation, now or later.
        """
        self._question, self._continued, self._round = question, False, 0
        self._names: dict[tuple[object, ...], LastingName | None] = {}
        self._reads: dict[tuple[object, ...], set[str]] = {}
        self._note(question.base, ())
        self.hear(first)
        branches = (each for asked in first.values() for each in asked)
        self._decide([question.base, *branches], asking)
        return self._continued

    def hear(self, asked: Mapping[int, Sequence[Branch]]) -> None:
        """Note the next questions of terms, by the numbers of the terms."""
        for term, branches in asked.items():
            for number, branch in enumerate(branches):
                self._note(branch, (term, self._round, number))
        self._round += 1

    def _note(self, branch: Branch, place: Asker) -> None:
        """Note what a branch is called at all steps, and what is read of it."""
        self._names.setdefault(branch.key, self._name(branch, place))
        reads = {capture_key(*capture) for capture in branch.captures}
        self._reads.setdefault(branch.key, set()).update(reads)

    def _name(self, branch: Branch, place: Asker) -> LastingName | None:
        """Return the name of a branch; None if it asks something new at each step."""
        base, null = self._question.base, self._question.null
        if branch.cond is base.cond:
            cond = "given"
        elif null is not None and branch.cond is null.cond:
            cond = "null"
        else:
            return None
        if not branch.model.keeps_outputs or not all(map(_lasts, branch.edits)):
            return None
        alike = branch.x_t is base.x_t and branch.level is None
        return (id(branch.model), cond, () if alike else place, branch.edits)

    def _decide(self, first: Sequence[Branch], asking: Set[int]) -> None:
        """Decide whether this evaluation is continued, by its first questions and who asks."""
        step, how = self._question.step, self._how
        slot = self.slots.get(self._evaluation)
        # The beginning of a run.
        if slot is None or not 0 < step.number - slot.number <= how.every:
            ready = set() if how.order else asking
            self.slots[self._evaluation] = Slot(step.number, asking, ready)
            return
        self._continued = (
            (step.number - how.beat) % how.every != 0
            and asking <= slot.ready
            and all(self._entry(branch) is not None for branch in first)
        )
        if not self._continued:
            before = slot.entries if how.order else {}
            ready = asking & slot.asking if how.order else asking
            slot = Slot(step.number, asking, ready, before=before)
            self.slots[self._evaluation] = slot

    @property
    def _evaluation(self) -> int:
        """The number of the evaluation within the sampler's step."""
        step = self._question.step
        return step.index % step.evaluations

    def serves(self, branch: Branch) -> bool:
        """Whether a branch is continued at this evaluation."""
        return self._continued and self._entry(branch) is not None

    def _entry(self, branch: Branch) -> KeptOutputs | None:
        """Return what a branch left, None if that is nothing or lacks what is read of it now."""
        name = self._names.get(branch.key)
        found = None if name is None else self.slots[self._evaluation].entries.get(name)
        reads = {capture_key(*capture) for capture in branch.captures}
        return None if found is None or not reads <= found.attention.keys() else found

    def keep(
        self, branch: Branch, outputs: Sequence[Sequence[Tensor]], attention: Mapping[str, Tensor]
    ) -> None:
        """Keep what the blocks have put out for a branch, and the attention that terms read."""
        name, slot = self._names.get(branch.key), self.slots[self._evaluation]
        if name is None:
            return
        step = self._question.step
        attention = {key: attention[key] for key in self._reads[branch.key] & attention.keys()}
        now = slot.entries.get(name)
        if now is not None and now.number == step.number:
            # Asked once more for a further capture.
            slot.entries[name] = KeptOutputs(now.number, now.orders, {**now.attention, **attention})
            return
        # The derivatives: differences to what the branch left before, over the steps between.
        orders, before = [outputs], slot.before.pop(name, None)
        if before is not None:
            for lower in before.orders[: self._how.order]:
                orders.append(_slopes(orders[-1], lower, step.number - before.number))
        slot.entries[name] = KeptOutputs(step.number, orders, attention)

    def outputs(self, branches: Sequence[Branch]) -> Iterator[list[Tensor]]:
        """Yield what each block puts out for branches that are continued, joined in one batch."""
        entries = [self._found(branch) for branch in branches]
        number = self._question.step.number
        for block in range(len(entries[0].orders[0])):
            parts = zip(*(entry.at(number, block) for entry in entries), strict=True)
            yield [each[0] if len(each) == 1 else torch.cat(each) for each in parts]

    def attention(self, branch: Branch) -> dict[str, Tensor]:
        """Return the attention that a continued branch wants, as it was read last."""
        entry = self._found(branch)
        keys = [capture_key(*capture) for capture in branch.captures]
        return {key: entry.attention[key] for key in keys}

    def _found(self, branch: Branch) -> KeptOutputs:
        entry = self._entry(branch)
        assert entry is not None
        return entry


def _slopes(
    new: Sequence[Sequence[Tensor]], old: Sequence[Sequence[Tensor]], between: int
) -> list[list[Tensor]]:
    """Return the differences of outputs over the steps between them, by block and part."""
    pairs = (zip(*parts, strict=True) for parts in zip(new, old, strict=True))
    return [[(now - then) / between for now, then in each] for each in pairs]


def recorded(into: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield an empty list for each block, which is to fill it; they stand in ``into``."""
    while True:
        into.append([])
        yield into[-1]


def continued(edit: Edit) -> bool:
    """Whether an edit acts where blocks are continued: on whole blocks, or outside of them.

    The effect of an edit of attention is in what was kept.
    """
    return not isinstance(edit, AttentionEdit)


def _lasts(edit: Edit) -> bool:
    """Whether an edit is the same at each step, and acts on what is kept or on what runs."""
    if any(isinstance(value, Tensor) for value in vars(edit).values()):
        return False
    block = block_number(edit.module)
    if isinstance(edit, AttentionEdit):
        return block is not None
    return block is None or edit.module == f"{CHAIN}{block}"
