"""What holds for every guidance method, on every kind of model, at both ends of the process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, SEG, CFGZero, GuidedDenoiser, Term, cost_of
from sag_dit.process import Flow, Step
from sag_dit.sampler import DDIM, EulerFlow, Sampler
from tests.closeness import assert_near
from tests.guidance import hunter
from tests.guidance.every import (
    CELLS,
    METHODS,
    MODELS,
    batch,
    edits_base,
    every,
    guided,
    switched_off,
)
from tests.guidance.hunter import Asked, Recording
from tests.guidance.reference import counted, step_at

ENDS = (0, 9)


def first_of(name: str) -> str:
    """A model that the method guides."""
    return next(model for model, method in CELLS if method == name)


@cache
def plain(model: str, index: int) -> Tensor:
    """What the model says without guidance."""
    return guided(MODELS[model], [], step_at(MODELS[model].process, index)).v


@pytest.mark.parametrize(("model", "name"), CELLS, ids=str)
def test_every_method_changes_v_and_stays_finite(model: str, name: str) -> None:
    denoiser, term = MODELS[model], every(model)[name]
    for index in (0, 4, 9) if term.remembers else ENDS:
        step, before = step_at(denoiser.process, index), plain(model, index)
        v = guided(denoiser, [term], step).v
        assert v.isfinite().all()
        change = (v - before).abs().flatten(1).amax(dim=1)
        if not Asked.at(denoiser, index).acts(term):
            assert torch.equal(v, before)
        else:
            # More than rounding alone.
            assert (change > 4e-6 * before.abs().amax()).all()


@pytest.mark.parametrize("name", METHODS)
def test_off_costs_no_forward_and_changes_no_bit(name: str) -> None:
    model = first_of(name)
    denoiser, term = MODELS[model], every(model)[name]
    off = switched_off(term)
    assert off.off and not term.off
    step = step_at(denoiser.process, 4)
    with counted(denoiser) as rows:
        v = guided(denoiser, [off], step).v
        paused = guided(denoiser, [replace(term, interval=(0.5, 0.6))], step).v
        weightless = guided(denoiser, [replace(term, schedule=lambda p: 0.0)], step).v
    assert rows == [3, 3, 3]
    for each in (v, paused, weightless):
        assert torch.equal(each, plain(model, 4))


@pytest.mark.parametrize("model", MODELS)
def test_all_at_once_equal_one_by_one(model: str) -> None:
    """As few calls as the questions allow, as many as there are branches: the same result."""
    denoiser = MODELS[model]
    terms = list(every(model).values())
    for index in ENDS:
        step = step_at(denoiser.process, index)
        with counted(denoiser) as rows:
            together = guided(denoiser, terms, step).v
        with counted(denoiser) as rows_apart:
            apart = guided(denoiser, terms, step, max_rows=3).v
        # Several branches share a call.
        assert len(rows) < len(rows_apart)
        assert sum(rows) == sum(rows_apart) and set(rows_apart) == {3}
        assert_near(together, apart, 1e-4)


@given(
    names=st.lists(st.sampled_from([n for m, n in CELLS if m == "eps"]), unique=True, max_size=4),
    index=st.integers(0, 9),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=6)
def test_terms_commute_and_add_up(names: list[str], index: int, random: object) -> None:
    """Apart from SAG's choice of a branch beside CFG, terms know nothing of one another.

    What acts on the guided prediction does so by its nature; that has a test of its own.
    """
    denoiser = MODELS["eps"]
    step = step_at(denoiser.process, index)
    terms = [
        replace(term, branch="cond") if hasattr(term, "branch") else term
        for term in (every("eps")[name] for name in names)
        if not term.on_guided
    ]
    shuffled = terms.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    # A term that edits the base does so for all others.
    editing = [term for term in terms if edits_base(term)]
    before = guided(denoiser, editing, step).v
    whole = guided(denoiser, terms, step).v
    parts = before + sum(
        guided(denoiser, [*editing, term], step).v - before
        for term in terms
        if not edits_base(term)
    )
    assert_near(guided(denoiser, shuffled, step).v, whole, 1e-4)
    assert_near(parts, whole, 1e-4)


@given(order=st.permutations([0, 1, 2]), name=st.sampled_from(METHODS))
@settings(max_examples=12)
def test_the_order_of_the_images_does_not_matter(order: list[int], name: str) -> None:
    model = first_of(name)
    step = step_at(MODELS[model].process, 4)
    term = every(model)[name]
    v = guided(MODELS[model], [term], step).v
    permuted = guided(MODELS[model], [term], step, order=order).v
    assert_near(permuted, v[order])


@given(
    name=st.sampled_from(
        [n for n in METHODS if n not in ("CFG-Zero*", "SMC-CFG", "CFG++") and "rescale" not in n]
    ),
    scale=st.floats(-2, 4),
    weight=st.floats(0.1, 3),
)
@settings(max_examples=12)
def test_a_schedule_scales_the_scale_s_excess_over_off(
    name: str, scale: float, weight: float
) -> None:
    """And contributions are linear in it."""
    model = first_of(name)
    step = step_at(MODELS[model].process, 4)
    term = replace(every(model)[name], scale=every(model)[name].neutral + scale)
    weighted = replace(term, schedule=lambda p: weight)
    scaled = replace(term, scale=term.neutral + weight * scale)
    found = guided(MODELS[model], [weighted], step).v
    assert_near(found, guided(MODELS[model], [scaled], step).v)


@given(
    cuts=st.lists(st.floats(1e-3, 300), min_size=0, max_size=4).map(sorted),
    unit=st.sampled_from(["t", "sigma"]),
    model=st.sampled_from(["eps", "eps, cosine", "flow"]),
    count=st.integers(1, 40),
)
def test_intervals_of_noise_meet_without_gap_or_overlap(
    cuts: list[float], unit: str, model: str, count: int
) -> None:
    """Every step of a run belongs to exactly one part, both ends included where left open."""
    process = MODELS[model].process
    edges = [None, *cuts, None]
    terms = [CFG(2.0, interval=pair, interval_in=unit) for pair in itertools.pairwise(edges)]  # type: ignore[arg-type]
    for step in (step_at(process, index, count) for index in range(count)):
        assert sum(term.active(step) for term in terms) == 1


@contextmanager
def evaluated(model: ClassConditional) -> Iterator[list[tuple[bool, int]]]:
    """Of every pass of the network whether it saw crops, and how many numbers."""
    seen: list[tuple[bool, int]] = []
    handle = model.network.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].shape[2:] != (8, 8), args[0].numel()))
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("model", MODELS)
def test_the_cost_that_is_told_is_what_is_paid(model: str) -> None:
    denoiser = MODELS[model]
    sampler: Sampler = EulerFlow() if isinstance(denoiser.process, Flow) else DDIM()
    cuts = itertools.cycle([(0.0, 1.0), (0.2, 0.5), (0.4, 0.9)])
    terms: list[Term] = [
        replace(term, interval=next(cuts), schedule="linear") for term in every(model).values()
    ]
    for chosen in ([], terms[4:7], terms):
        told = cost_of(denoiser, chosen, sampler, 6)
        paid_rounds, paid_rows = [], []
        asking = Recording(denoiser, chosen)
        x, y = batch()
        for index in range(6):
            before = asking.rounds
            with hunter.counted(denoiser, chosen) as rows:
                asking(x, step_at(denoiser.process, index, 6), y)
            paid_rounds.append(asking.rounds - before)
            paid_rows.append(sum(rows) / 3)
        assert list(told.rounds) == paid_rounds
        expected = [a + b for a, b in zip(told.rows, told.others, strict=True)]
        assert paid_rows == pytest.approx(expected)


@pytest.mark.parametrize("model", MODELS)
def test_what_says_nothing_changes_nothing(model: str) -> None:
    """A mask of 0, a blur of 0, and classifier-free guidance at scale 1."""
    denoiser = MODELS[model]
    for index in ENDS:
        step, before = step_at(denoiser.process, index), plain(model, index)
        nothing: list[Term] = [
            CFG(1.0),
            SAG(1.0, threshold=99.0),
            SAG(1.0, blur_sigma=0.01),
            SEG(1.0, blur_sigma=0.01),
        ]
        assert_near(guided(denoiser, nothing, step).v, before)


def test_zero_init_comes_to_0() -> None:
    denoiser = MODELS["flow"]
    x, y = batch()
    first = Step(0, 10, *denoiser.process.grid(10)[:2])
    assert GuidedDenoiser(denoiser, [CFGZero(2.0)])(x, first, y).v.abs().max() == 0
