"""What guidance costs: how many forward passes of how many rows, and when."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import (
    CFG,
    SAG,
    Autoguidance,
    BlurGuidance,
    ClassifierGuidance,
    Cost,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.cost import Batches
from sag_dit.guidance.term import Asking
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.sampler import DDIM, Ancestral
from sag_dit.sampler.ddpm import Variance
from tests.closeness import assert_near
from tests.guidance.every import MODELS, WORSE, Classifier
from tests.guidance.reference import counted, step_at

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])


@dataclass(frozen=True)
class Never(Term):
    """Fails as soon as anything is asked of it; off at scale 0."""

    scale: float = 0.0

    def contribution(self, ask: Question) -> Asking:
        raise AssertionError("started")
        yield ()


@dataclass(frozen=True)
class Plus(Term):
    """Adds its scale to v; asks nothing."""

    def contribution(self, ask: Question) -> Asking:
        return torch.full_like(ask.base.x_t, self.scale)
        yield ()


# --- cost -----------------------------------------------------------------------------------------

COSTS: list[tuple[Sequence[Term], list[int]]] = [
    ([], [3]),
    ([CFG(1.0)], [3]),
    ([SAG(0.0), BlurGuidance(0.0), CFG(1.0), Never()], [3]),
    ([CFG(2.0)], [6]),
    ([SAG(1.0)], [3, 3]),
    ([BlurGuidance(1.0)], [3, 3]),
    ([CFG(2.0), SAG(1.0)], [6, 3]),
    ([CFG(2.0), SAG(1.0), BlurGuidance(1.0)], [6, 6]),
    ([CFG(2.0), SAG(1.0, branch="cond")], [6, 3]),
    ([SAG(1.0, branch="null")], [6, 3]),
    ([SAG(1.0), SAG(0.5, layer="blocks.0"), SAG(0.5, layer="blocks.2")], [3, 9]),
    ([CFG(2.0), CFG(3.0)], [6]),
    ([Plus(1.0)], [3]),
]


@pytest.mark.parametrize(("terms", "rows"), COSTS, ids=lambda value: str(value)[:60])
def test_forward_passes_and_rows(
    denoiser: ClassConditional, batch: Batch, terms: Sequence[Term], rows: list[int]
) -> None:
    guided = GuidedDenoiser(denoiser, terms)
    with counted(denoiser) as seen:
        guided(batch[0], step_at(denoiser.process, 4), batch[1])
    assert seen == rows


@pytest.mark.parametrize(("terms", "rows"), COSTS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("max_rows", [3, 7])
def test_batched_equals_one_by_one(
    denoiser: ClassConditional,
    batch: Batch,
    terms: Sequence[Term],
    rows: list[int],
    max_rows: int,
) -> None:
    step = step_at(denoiser.process, 4)
    together = GuidedDenoiser(denoiser, terms)(batch[0], step, batch[1])
    with counted(denoiser) as seen:
        apart = GuidedDenoiser(denoiser, terms, max_rows=max_rows)(batch[0], step, batch[1])
    assert sum(seen) == sum(rows) and max(seen) <= max_rows
    assert_near(together.v, apart.v)


def test_a_question_answered_before_costs_nothing(denoiser: ClassConditional, batch: Batch) -> None:
    @dataclass(frozen=True)
    class AsksAgain(Never):
        def contribution(self, ask: Question) -> Asking:
            (first,) = yield (ask.base,)
            again, null, same = yield ask.base, ask.required_null(), ask.required_null()
            assert again is first and null is same
            return torch.zeros_like(first.v)

    with counted(denoiser) as seen:
        guided = GuidedDenoiser(denoiser, [AsksAgain(1.0), CFG(2.0)])
        guided(batch[0], step_at(denoiser.process, 4), batch[1])
    assert seen == [6]


@pytest.mark.parametrize("max_rows", [0, -1])
def test_no_rows_at_all_are_refused(denoiser: ClassConditional, max_rows: int) -> None:
    with pytest.raises(ValueError, match=f"max_rows={max_rows}: expected 1 or more"):
        GuidedDenoiser(denoiser, max_rows=max_rows)


# --- off, on, and when ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "acts"),
    [
        ((0.0, 1.0), range(10)),
        ((0.2, 0.5), range(2, 5)),
        ((0.0, 0.3), range(3)),
        ((0.9, 1.0), range(9, 10)),
        ((0.5, 0.5), range(0)),
        ((0.25, 0.35), range(3, 4)),
    ],
)
def test_intervals_are_half_open(
    denoiser: ClassConditional, batch: Batch, interval: tuple[float, float], acts: range
) -> None:
    guided = GuidedDenoiser(denoiser, [CFG(2.0, interval=interval)])
    for index in range(10):
        with counted(denoiser) as seen:
            guided(batch[0], step_at(denoiser.process, index), batch[1])
        assert seen == ([6] if index in acts else [3])


@given(
    bounds=st.lists(st.floats(0, 1), min_size=0, max_size=4).map(sorted), count=st.integers(1, 60)
)
def test_adjoining_intervals_meet_without_gap_or_overlap(bounds: list[float], count: int) -> None:
    """Every step of a run belongs to exactly one of the intervals that [0, 1) is cut into."""
    edges = [0.0, *bounds, 1.0]
    terms = [Plus(1.0, interval=pair) for pair in itertools.pairwise(edges)]
    process = DDPM()
    grid = process.grid(1)
    for index in range(count):
        step = replace(step_at(process, 0, 1), index=index, count=count, level=grid[0])
        assert sum(term.active(step) for term in terms) == 1


def test_a_term_outside_its_interval_never_starts(denoiser: ClassConditional, batch: Batch) -> None:
    guided = GuidedDenoiser(denoiser, [Never(1.0, interval=(0.5, 1.0))])
    guided(batch[0], step_at(denoiser.process, 4), batch[1])
    with pytest.raises(AssertionError, match="started"):
        guided(batch[0], step_at(denoiser.process, 5), batch[1])


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_intervals_outside_the_run_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"interval=.*0 <= start <= stop <= 1"):
        CFG(2.0, interval=interval)


@pytest.mark.parametrize(
    "term", [SAG(1.0), BlurGuidance(1.0), CFG(2.0)], ids=lambda term: type(term).__name__
)
@pytest.mark.parametrize("index", [0, 5, 9])
def test_every_term_changes_v(
    denoiser: ClassConditional, batch: Batch, term: Term, index: int
) -> None:
    step = step_at(denoiser.process, index)
    plain = GuidedDenoiser(denoiser)(batch[0], step, batch[1])
    guided = GuidedDenoiser(denoiser, [term])(batch[0], step, batch[1])
    assert ((guided.v - plain.v).abs().flatten(1).amax(1) > 1e-4).all()


@dataclass(frozen=True)
class Curious(Term):
    """Asks once more for the images whose class is below the scale."""

    def contribution(self, ask: Question) -> Asking:
        again = ask.base.at(ask.base.x_t + (ask.base.cond < self.scale)[:, None, None, None])
        base, other = yield ask.base, again
        return self.scale * (base.v - other.v)


def test_a_method_may_look_at_the_condition(denoiser: ClassConditional) -> None:
    cost = cost_of(denoiser, [Curious(2.0)], DDIM(), 3)
    assert (cost.rounds, cost.rows, cost.others) == ((1, 1, 1), (2, 2, 2), (0, 0, 0))


@pytest.mark.parametrize("variance", ["auto", "learned"])
def test_a_sampler_may_ask_for_the_variance_that_a_network_learned(
    denoiser: ClassConditional, make_dit: Callable[..., DiT], variance: Variance
) -> None:
    assert cost_of(denoiser, [SAG(1.0)], Ancestral(variance), 3).rounds == (2, 2, 2)
    none = ClassConditional(make_dit(learn_sigma=False), DDPM())
    if variance == "learned":
        with pytest.raises(ValueError, match="predicts no variance"):
            cost_of(none, [], Ancestral(variance), 3)


def test_a_worse_model_counts_by_its_size_and_a_classifier_apart() -> None:
    model, worse = MODELS["eps"], WORSE["eps"]
    sizes = [sum(each.numel() for each in own.parameters()) for own in (worse, model)]
    cost = cost_of(model, [Autoguidance(2.0, worse=worse)], DDIM(), 4)
    assert cost.relative == pytest.approx(1 + sizes[0] / sizes[1])
    assert 1.2 < cost.relative < 1.9 and cost.others == (1, 1, 1, 1)
    assert "another" not in str(cost)

    other = cost_of(model, [CFG(2.0), ClassifierGuidance(1.0, classifier=Classifier())], DDIM(), 4)
    assert other.relative == 2
    assert str(other).endswith("for each image instead of 4 and 4 of another network")


@pytest.mark.parametrize(
    ("count", "ranks", "full"),
    [(16, 1, None), (1, 1, 16), (17, 1, 32), (300, 1, None), (16, 2, 32), (33, 3, 48)],
)
def test_padding_is_told_where_it_matters(count: int, ranks: int, full: int | None) -> None:
    told = Batches(count, 16, ranks).padding()
    if full is None:
        assert told == ""
    else:
        assert re.match(rf"{count} images? costs? as much as {full}: ", told)
        assert "batch_size=1 costs less" in told


def test_twins_are_told_by_what_they_cost() -> None:
    """Two of three batches have unguided twins, of one pass an evaluation, beside two passes."""
    run, plain = Cost((1,), (2,), (0,)), Cost((1,), (1,), (0,))
    told = Batches(12, 4).twins(5, run, [plain])
    assert told == "the 5 twins of the gallery add 33 % to that; gallery.num=0 leaves them out"
    # The second twin of each, at the cost of the run itself.
    assert "the 10 twins of the gallery add 100 %" in Batches(12, 4).twins(5, run, [plain, run])
