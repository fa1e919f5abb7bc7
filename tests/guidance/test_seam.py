"""The seam carries what later methods need: a throw-away term of each kind, written here.

Contributions of an own form, state over a run, and row-wise edits of attention, blocks, time
embedding and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sag_dit.attention import AttentionEdit, Edit, InputEdit, OutputEdit
from sag_dit.attention.edits import Attend
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, GuidedDenoiser, Question, Term
from sag_dit.guidance.term import Asking
from sag_dit.process import Prediction
from tests.closeness import assert_near
from tests.guidance.reference import step_at

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])


# --- row-wise edits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelfOnly(AttentionEdit):
    """Perturbed-attention guidance: each token looks at itself."""

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        return value


@dataclass(frozen=True)
class MeanQuery(AttentionEdit):
    """Smoothed-energy guidance at an infinite blur: all queries are their mean."""

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        return attend(query.mean(dim=2, keepdim=True).expand_as(query), key, value)


@dataclass(frozen=True)
class SkipBlock(OutputEdit):
    """Skip-layer guidance: the block returns what went in."""

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class ShiftedTime(OutputEdit):
    """Time-step guidance: the time embedding is moved."""

    by: float

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self.by


@dataclass(frozen=True)
class Permute(InputEdit):
    """Token-perturbation guidance: the tokens of a block in another order."""

    def edit_input(self, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        return x[:, order]


EDITS: list[tuple[Edit, ...]] = [
    (SelfOnly("blocks.1.attn"),),
    (SelfOnly("blocks.0.attn"), SelfOnly("blocks.2.attn")),
    (MeanQuery("blocks.1.attn"),),
    (SkipBlock("blocks.1"),),
    (ShiftedTime("t_embedder", 0.5),),
    (Permute("blocks.2"),),
    (SelfOnly("blocks.1.attn"), SkipBlock("blocks.2"), ShiftedTime("t_embedder", 0.5)),
]


@dataclass(frozen=True)
class Perturbed(Term):
    """s (v - v of the same question with edits), and a look at what it was answered."""

    edits: tuple[Edit, ...] = ()

    def contribution(self, ask: Question) -> Asking:
        base, worse = yield ask.base, ask.base.edited(*self.edits)
        ask.memory["answers"] = (base, worse)
        return self.scale * (base.v - worse.v)


def answers(guided: GuidedDenoiser, index: int = 0) -> tuple[Prediction, Prediction]:
    found: tuple[Prediction, Prediction] = guided._memory[index]["answers"]
    return found


@pytest.mark.parametrize("edits", EDITS, ids=lambda e: "+".join(type(x).__name__ for x in e))
def test_edited_branches_leave_the_base_as_it_is(
    denoiser: ClassConditional, batch: Batch, edits: tuple[Edit, ...]
) -> None:
    """In the batch of both, bit for bit as in a batch of two bases; and all of it is added."""
    x, y = batch
    step = step_at(denoiser.process, 4)
    untouched = denoiser(torch.cat([x, x]), step.level, torch.cat([y, y]))
    guided = GuidedDenoiser(denoiser, [Perturbed(0.7, edits=edits)])
    result = guided(x, step, y)
    base, worse = answers(guided)
    assert torch.equal(base.v, untouched.v[:3])
    assert base.variance_fraction is not None and untouched.variance_fraction is not None
    assert torch.equal(base.variance_fraction, untouched.variance_fraction[:3])
    assert ((base.v - worse.v).abs().flatten(1).amax(1) > 1e-3).all()
    assert_near(result.v, base.v + 0.7 * (base.v - worse.v))
    alone = denoiser(x, step.level, y, edits=[(edit, slice(0, 3)) for edit in edits])
    assert_near(worse.v, alone.v)


def test_all_perturbations_at_once_share_one_batch(
    denoiser: ClassConditional, batch: Batch
) -> None:
    """Beside CFG and SAG too, and each as if it were alone; equal questions are asked once."""
    x, y = batch
    step = step_at(denoiser.process, 4)
    terms = [Perturbed(0.5, edits=edits) for edits in EDITS]
    rows: list[int] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    everything = [CFG(2.0), *terms, SAG(0.5), Perturbed(0.1, edits=(SelfOnly("blocks.1.attn"),))]
    together = GuidedDenoiser(denoiser, everything)
    result = together(x, step, y)
    handle.remove()
    assert rows == [3 * (2 + len(EDITS)), 3]
    expected = GuidedDenoiser(denoiser, [CFG(2.0), SAG(0.5)])(x, step, y).v
    for i, edits in enumerate(EDITS):
        alone = GuidedDenoiser(denoiser, [Perturbed(0.5, edits=edits)])
        alone(x, step, y)
        base, worse = answers(alone)
        assert_near(answers(together, i + 1)[1].v, worse.v)
        expected = expected + 0.5 * (base.v - worse.v)
    base, worse = answers(together, 1)
    expected = expected + 0.1 * (base.v - worse.v)
    # Ten predictions with their own rounding are added up.
    assert_near(result.v, expected, 1e-4)


def test_captures_of_an_edited_branch_are_its_own(denoiser: ClassConditional, batch: Batch) -> None:
    """What one branch reads downstream of its edit is not what the clean branch reads."""

    @dataclass(frozen=True)
    class Both(Term):
        def contribution(self, ask: Question) -> Asking:
            clean = ask.base.capturing("blocks.2").capturing("blocks.2", "map")
            edited = ask.base.edited(SkipBlock("blocks.0")).capturing("blocks.2")
            ask.memory["answers"] = yield clean, edited
            return torch.zeros_like(ask.base.x_t)

    guided = GuidedDenoiser(denoiser, [Both()])
    guided(batch[0], step_at(denoiser.process, 4), batch[1])
    clean, edited = answers(guided)
    assert set(clean.attention) == {"blocks.2.attn", "blocks.2.attn:map"}
    assert set(edited.attention) == {"blocks.2.attn"}
    assert clean.attention["blocks.2.attn"].shape == (3, 16)
    assert clean.attention["blocks.2.attn:map"].shape == (3, 4, 16, 16)
    received = clean.attention["blocks.2.attn:map"].mean(1).sum(1)
    assert_near(clean.attention["blocks.2.attn"], received)
    assert (received - edited.attention["blocks.2.attn"]).abs().max() > 1e-2


def test_a_capture_wanted_later_is_answered_without_changing_the_base(
    denoiser: ClassConditional, batch: Batch
) -> None:
    @dataclass(frozen=True)
    class Late(Term):
        def contribution(self, ask: Question) -> Asking:
            (first,) = yield (ask.base.capturing("blocks.0"),)
            (second,) = yield (ask.base.capturing("blocks.2"),)
            assert "blocks.0.attn" in first.attention and "blocks.2.attn" in second.attention
            assert_near(first.v, second.v)
            return torch.zeros_like(ask.base.x_t)

    step = step_at(denoiser.process, 4)
    result = GuidedDenoiser(denoiser, [Late()])(batch[0], step, batch[1])
    assert_near(result.v, denoiser(batch[0], step.level, batch[1]).v)
    assert set(result.attention) == {"blocks.0.attn", "blocks.2.attn"}


# --- a contribution of an own form, and state over a run ------------------------------------------


@dataclass(frozen=True)
class Projected(Term):
    """Adaptive projected guidance: drop what is parallel to x_0, bound the norm, with momentum."""

    norm: float = 2.0
    momentum: float = -0.5

    def contribution(self, ask: Question) -> Asking:
        cond, null = yield ask.base, ask.required_null()
        difference = cond.x_0 - null.x_0 + self.momentum * ask.memory.get("average", 0.0)
        ask.memory["average"] = difference
        difference = project(difference, cond.x_0, self.norm)
        return -self.scale * difference / ask.step.level.sigma


def project(difference: Tensor, x_0: Tensor, norm: float) -> Tensor:
    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)

    difference = difference * (norm / dot(difference, difference).sqrt()).clamp(max=1)
    return difference - dot(difference, x_0) / dot(x_0, x_0) * x_0


def test_a_contribution_of_its_own_form_with_momentum(
    denoiser: ClassConditional, batch: Batch
) -> None:
    """Three steps by hand, in x_0; a new run starts anew."""
    x, y = batch
    steps = [step_at(denoiser.process, index) for index in (3, 4, 5)]
    guided = GuidedDenoiser(denoiser, [Projected(1.5)])
    average = torch.zeros_like(x)
    results = []
    for step in steps:
        cond = denoiser(x, step.level, y)
        null = denoiser(x, step.level, torch.full_like(y, 10))
        average = cond.x_0 - null.x_0 - 0.5 * average
        expected = cond.x_0 + 1.5 * project(average, cond.x_0, 2.0)
        results.append(guided(x, step, y))
        assert_near(results[-1].x_0, expected)
    again = GuidedDenoiser(denoiser, [Projected(1.5)])(x, steps[0], y)
    assert torch.equal(again.v, results[0].v)
    late = GuidedDenoiser(denoiser, [Projected(1.5)])(x, steps[2], y)
    assert (late.v - results[2].v).abs().max() > 1e-3


@dataclass(frozen=True)
class Counting(Term):
    """Adds how often it was asked in this run."""

    def contribution(self, ask: Question) -> Asking:
        ask.memory["count"] = ask.memory.get("count", 0) + 1
        return torch.full_like(ask.base.x_t, float(ask.memory["count"]))
        yield ()


def test_memory_is_each_term_s_own_for_one_run(denoiser: ClassConditional, batch: Batch) -> None:
    """Two equal terms do not share it, nor does a term that pauses lose it."""
    x, y = batch
    plain = {i: GuidedDenoiser(denoiser)(x, step_at(denoiser.process, i), y).v for i in range(6)}
    guided = GuidedDenoiser(
        denoiser, [Counting(), Counting(0.0), Counting(interval=(0.0, 0.2)), Counting()]
    )
    added = [
        (guided(x, step_at(denoiser.process, i), y).v - plain[i]).mean().item() for i in range(4)
    ]
    assert added == pytest.approx([3, 6, 6, 8], abs=1e-4)
