"""What is tried, how candidates are ranked, and what of a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sag_dit.guidance
from sag_dit.guidance import CFG, SAG, Term
from sag_dit.methods import methods
from sag_dit.study.tuning import (
    Budget,
    Ledger,
    Space,
    Spent,
    ask,
    best,
    dominates,
    fronts,
    limits,
    scale_key,
    spread_over,
)

optuna = pytest.importorskip("optuna")
LAYERS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
POINTS = st.lists(st.tuples(*2 * [st.integers(0, 5).map(float)]), min_size=1, max_size=30)


def in_memory() -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize", "minimize"])


def term_of(key: str) -> Term:
    """A method with its scale on; that of a second model or a classifier names none here."""
    kind: type[Term] = next(
        getattr(sag_dit.guidance, method.name) for method in methods() if method.key == key
    )
    further: dict[str, Any] = {"auto": {"ckpt": "worse"}, "classifier": {"classifier": "judge"}}
    return kind(kind.neutral + 1, **further.get(key, {}))


def applied(term: Term, name: str, changes: Mapping[str, Any]) -> Term:
    """The term with what is proposed of it."""
    scale, start = scale_key(name), f"guidance.{name}."
    own = {key.removeprefix(start): each for key, each in changes.items() if key.startswith(start)}
    return replace(term, scale=changes.get(scale, term.scale), **own)


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.key)
def test_what_every_method_declares_can_be_tried(method: Any) -> None:
    term = term_of(method.key)
    tried = type(term).searched()
    assert {"scale", "interval", "every"} <= set(tried) <= {each.name for each in fields(term)}
    space, study = Space({method.key: term}, LAYERS, [10, 20]), in_memory()
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    seen: dict[str, set[str]] = {}
    refused = 0
    for _ in range(40):
        changes = space.propose(study.ask())
        try:
            made = applied(term, method.key, changes)
        except ValueError:  # Two settings that a method refuses together.
            refused += 1
            continue
        assert not made.off and made.interval[0] < made.interval[1]  # type: ignore[operator]
        for key, value in changes.items():
            seen.setdefault(key.rpartition(".")[2], set()).add(str(value))
    assert refused < 30
    # Every setting has taken several values, if there are any, and of a list all.
    assert all(len(values) > 1 for key, values in seen.items() if tried.get(key) != [1])
    for key, values in tried.items():
        if isinstance(values, list):
            assert {str(each) for each in values} == seen[key]


def test_methods_that_stand_in_for_one_another_are_not_combined() -> None:
    terms = {name: term_of(name) for name in ("cfg", "apg", "sag", "pag")}
    sets = Space(terms, LAYERS, [20]).sets
    assert {"cfg", "cfg+sag", "apg+pag", "sag+pag"} <= set(sets)
    assert "cfg+apg" not in sets and max(map(len, sets.values())) == 2


def test_what_is_pinned_stays_and_a_pinned_scale_is_always_on() -> None:
    terms = {"cfg": CFG(1.5), "sag": SAG(0.5, layer="blocks.1")}
    pinned = frozenset({"cfg_scale", "guidance.sag.layer", "guidance.cfg.interval"})
    space, study = Space(terms, LAYERS, [20], pinned), in_memory()
    assert set(space.sets) == {"cfg", "cfg+sag"}
    for number in range(20):
        changes = space.propose(ask(study, number))
        assert not pinned & set(changes)
        assert changes["steps"] == 20


def test_an_interval_in_another_unit_is_the_users() -> None:
    space = Space({"cfg": CFG(1.5, interval=(0.3, 3.0), interval_in="sigma")}, LAYERS, [20])
    assert "guidance.cfg.interval" not in space.propose(ask(in_memory(), 0))


def test_the_search_learns_where_a_known_objective_is_good() -> None:
    """Quality is best at SAG of scale 0.5 on the last layer; every other step costs less."""
    study, values = in_memory(), []
    space = Space({"cfg": CFG(1.5), "sag": SAG(0.5)}, LAYERS, [20])
    for _ in range(70):
        trial = ask(study, seed=3)
        changes = space.propose(trial)
        quality = 3.0
        if "guidance.sag.layer" in changes:
            quality = abs(math.log(changes["sag_scale"] / 0.5))
            quality += 0.5 * (changes["guidance.sag.layer"] != LAYERS[-1])
        cost = 2.0 / changes.get("guidance.sag.every", 1)
        values.append(quality)
        study.tell(trial, [quality, cost])
    assert min(values[10:]) < 0.3 * min(values[:10]) + 0.02
    assert sum(values[-30:]) / 30 < 0.7 * sum(values[:10]) / 10


def test_a_proposal_follows_from_the_seed_and_the_trials_before() -> None:
    space = Space({"sag": SAG(0.5)}, LAYERS, [20])
    first, again, other = (space.propose(ask(in_memory(), seed)) for seed in (1, 1, 2))
    assert first == again != other


@given(POINTS, st.integers(0, 12))
def test_halving_keeps_all_that_nothing_dominates(
    points: list[tuple[float, float]], count: int
) -> None:
    kept = best(points, count)
    undominated = {
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    }
    assert undominated <= set(kept) and len(kept) == len(set(kept))
    assert len(kept) == max(len(undominated), min(count, len(points)))
    # Nothing that is left out is better than something of a later front.
    ranks = {place: rank for rank, front in enumerate(fronts(points)) for place in front}
    left = set(range(len(points))) - set(kept)
    assert not left or max(ranks[place] for place in kept) <= min(ranks[place] for place in left)
    assert sorted(ranks) == list(range(len(points)))


@given(POINTS, st.integers(2, 5))
def test_of_a_front_the_best_and_others_are_confirmed(
    points: list[tuple[float, float]], count: int
) -> None:
    front = fronts(points)[0]
    chosen = spread_over(front, points, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(front))
    assert points[chosen[0]] == min(points[place] for place in front)
    assert set(chosen) <= set(front)


def test_the_rungs_leave_the_confirmation_its_share() -> None:
    for count in (1, 2, 3, 6):
        shares = limits(count)
        assert shares == sorted(shares) and len(shares) == count
        assert shares[-1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("number", "unit", "budget"),
    [
        (10, "min", Budget(600, "seconds")),
        (1.5, "h", Budget(5400, "seconds")),
        (90, "s", Budget(90, "seconds")),
        (2e5, "passes", Budget(200_000, "passes")),
    ],
)
def test_budgets(number: float, unit: str, budget: Budget) -> None:
    assert Budget.of(number, unit) == budget


def test_the_ledger_adds_up_what_all_processes_wrote(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "spent.jsonl"), Ledger(tmp_path / "spent.jsonl")
    assert first.total() == Spent(0, 0.0)
    first.add(Spent(100, 1.5))
    second.add(Spent(20, 0.5))
    assert first.total() == second.total() == Spent(120, 2.0)
    assert (first.total().of("passes"), first.total().of("seconds")) == (120, 2.0)
