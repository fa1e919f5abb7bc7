"""Tuning: what a search tries, how candidates are ranked, and what of the budget is spent.

Nothing here draws. Candidates are proposed by Optuna, whose trials are passed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sag_dit.bounds import Natural
from sag_dit.files import writing
from sag_dit.guidance import Cost, Term
from sag_dit.methods import methods
from sag_dit.untrusted import read_json_lines

if TYPE_CHECKING:
    from optuna import Study, Trial

Changes = Mapping[str, Any]
"""In what a candidate differs from the configuration: key -> value."""
Unit = Literal["seconds", "passes"]

SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
STARTING = 10
"""Proposals at random before Optuna learns from what they came to."""
TOGETHER = 2
"""Methods that a candidate switches on at most."""


@dataclass(frozen=True)
class Budget:
    """What a study may take: seconds, or passes of the network, one image in one evaluation.

    Example:
        >>> Budget.of(10, "min").text, Budget.of(200_000, "passes").text
        ('10 minutes', '200,000 passes')
    """

    amount: float
    unit: Unit

    @classmethod
    def of(cls, number: float, unit: str) -> Budget:
        """Return a budget in one of the units that a user may write.

        Example:
            >>> Budget.of(2, "h").amount
            7200
        """
        if unit == "passes":
            return cls(number, "passes")
        return cls(number * SECONDS[unit], "seconds")

    @property
    def text(self) -> str:
        """The budget as one says it."""
        if self.unit == "passes":
            return f"{self.amount:,.0f} passes"
        return f"{self.amount / 60:.4g} minutes" if self.amount >= 60 else f"{self.amount:.4g} s"


def passes(cost: Cost) -> int:
    """Return the passes of all networks that one image takes, as a whole number.

    Example:
        >>> passes(Cost(rounds=(2, 1), rows=(2, 1), others=(0, 0)))
        3
    """
    return round(sum(cost.rows) + sum(cost.others))


@dataclass(frozen=True, eq=False)
class Space:
    """What may be tried: sets of methods, their settings, and numbers of steps.

    ``terms`` are the methods as they are configured, by name; ``layers`` are the names of the
    model's self-attention layers. Keys that are ``pinned`` stay as they are. A method whose scale
    is pinned is part of every candidate.

    Raises:
        ValueError: nothing is left to try.

    Example::

        space = Space({"sag": SAG(1.0)}, layers=[*model.denoiser.layers], steps=[20])
        changes = space.propose(study.ask())
    """

    terms: Mapping[str, Term]
    layers: Sequence[str]
    steps: Sequence[int]
    pinned: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.sets:
            raise ValueError("methods=[]: expected one or more, such as methods=[cfg,sag]")

    @property
    def always(self) -> tuple[str, ...]:
        """The methods that are part of every candidate."""
        return tuple(name for name in self.terms if scale_key(name) in self.pinned)

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """The sets of methods that are tried, by what they are called.

        Methods that guide away from the null condition, as CFG does, stand in for one another.
        """
        free = [name for name in self.terms if name not in self.always]
        found = {}
        for count in range(0 if self.always else 1, TOGETHER + 1):
            for chosen in combinations(free, count):
                names = (*self.always, *chosen)
                if sum(self.terms[name].from_null for name in names) <= 1 or not chosen:
                    found["+".join(names)] = names
        return found

    @property
    def off(self) -> dict[str, Any]:
        """The changes that switch every method off that is not part of every candidate."""
        names = (name for name in self.terms if name not in self.always)
        return {
            key: self.terms[name].neutral
            for name in names
            for key in (scale_key(name), *_further_strengths(name, self.terms[name]))
        }

    def propose(self, trial: Trial) -> dict[str, Any]:
        """Return the changes of a candidate, each value suggested by a trial of Optuna's."""
        sets = self.sets
        chosen = sets[trial.suggest_categorical("methods", list(sets))]
        changes = dict(self.off)
        for name in chosen:
            changes |= self._settings(trial, name)
        steps = self.steps[0]
        if len(self.steps) > 1:
            steps = trial.suggest_categorical("steps", list(self.steps))
        return {**changes, "steps": steps}

    def _settings(self, trial: Trial, name: str) -> dict[str, Any]:
        """Return what is suggested of the settings of one method."""
        term, changes = self.terms[name], dict[str, Any]()
        for setting, tried in type(term).searched().items():
            key = scale_key(name) if setting == "scale" else f"guidance.{name}.{setting}"
            if key in self.pinned:
                continue
            if tried == "eighths":
                # An interval in another unit is the user's.
                if term.interval_in == "progress":
                    changes[key] = _tried_interval(trial, f"{name}.{setting}")
            elif tried == "each layer":
                changes[key] = trial.suggest_categorical(f"{name}.{setting}", list(self.layers))
                # Where several can be named, they stand in a list.
                if setting == "layers":
                    changes[key] = [changes[key]]
            elif isinstance(tried, tuple):
                above = term.neutral if setting == "scale" else 0.0
                changes[key] = _tried_number(trial, f"{name}.{setting}", tried, above)
            else:
                # Optuna keeps texts in its journal, and no infinite numbers.
                values = {f"{value:g}" if isinstance(value, float) else str(value): value
                          for value in tried}  # fmt: skip
                chosen = trial.suggest_categorical(f"{name}.{setting}", list(values))
                changes[key] = values[chosen]
        return changes


def ask(study: Study, seed: int) -> Trial:
    """Return a new trial, whose values follow from the seed and the trials before it.

    Example::

        changes = space.propose(ask(study, seed=0))
    """
    from optuna.samplers import TPESampler

    def sampler(number: int) -> TPESampler:
        digest = hashlib.sha256(f"{seed} {number}".encode()).hexdigest()
        return TPESampler(seed=int(digest[:8], 16), n_startup_trials=STARTING)

    study.sampler = sampler(len(study.get_trials(deepcopy=False)))
    trial = study.ask()
    # Another process may have taken that number meanwhile.
    study.sampler = sampler(trial.number)
    return trial


def scale_key(name: str) -> str:
    """Return the key of a method's scale.

    Example:
        >>> scale_key("sag"), scale_key("mine")
        ('sag_scale', 'guidance.mine.scale')
    """
    known = any(method.key == name for method in methods())
    return f"{name}_scale" if known else f"guidance.{name}.scale"


def _further_strengths(name: str, term: Term) -> list[str]:
    return [f"guidance.{name}.{each}" for each in term.strengths if each != "scale"]


def _tried_interval(trial: Trial, name: str) -> list[float]:
    start = trial.suggest_int(f"{name}.start", 0, 7)
    length = trial.suggest_int(f"{name}.length", 1, 8)
    return [start / 8, min(8, start + length) / 8]


def _tried_number(
    trial: Trial, name: str, bounds: tuple[float, float], above: float
) -> float | int:
    """Suggest a number of two digits; over wide ranges small ones are tried as often as large."""
    low, high = bounds
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high)
    value = trial.suggest_float(name, low, high, log=low > 0 and high / low > 4)
    return round(above + float(f"{value:.2g}"), 6)


Point = tuple[float, float]
"""How good a candidate is and what it costs; of both less is better."""


def dominates(one: Point, other: Point) -> bool:
    """Whether a point is at least as good in both, and better in one.

    Example:
        >>> dominates((1.0, 2.0), (1.0, 3.0)), dominates((1.0, 2.0), (2.0, 1.0))
        (True, False)
    """
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def fronts(points: Sequence[Point]) -> list[list[int]]:
    """Return places front by front: the first holds what nothing dominates, and so on.

    Within a front the cheapest comes first.

    Example:
        >>> fronts([(3.0, 1.0), (1.0, 2.0), (4.0, 2.0)])
        [[0, 1], [2]]
    """
    left, found = set(range(len(points))), []
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        found.append(sorted(front, key=lambda i: (points[i][1], points[i][0], i)))
        left -= set(front)
    return found


def best(points: Sequence[Point], count: int) -> list[int]:
    """Return the places of at least ``count`` points: all that nothing dominates, then the next.

    Of each front those of best quality come first, and of the one that is cut they are taken.

    Example:
        >>> best([(3.0, 1.0), (1.0, 2.0), (4.0, 2.0), (5.0, 2.0)], 3)
        [1, 0, 2]
    """
    chosen: list[int] = []
    for place, front in enumerate(fronts(points)):
        room = max(0, count - len(chosen)) if place else len(front)
        chosen += sorted(front, key=lambda i: points[i])[:room]
    return chosen


def spread_over(front: Sequence[int], points: Sequence[Point], count: int) -> list[int]:
    """Return at most ``count`` places of a front: the best, and others evenly over its costs.

    Example:
        >>> spread_over([0, 1, 2, 3], [(4.0, 1.0), (3.0, 2.0), (2.0, 3.0), (1.0, 4.0)], 3)
        [3, 0, 1]
    """
    first = min(front, key=lambda i: points[i])
    others = [i for i in front if i != first]
    if len(others) >= count:
        others = [others[round(k * len(others) / (count - 1) - 0.5)] for k in range(count - 1)]
    return [first, *others]


@dataclass(frozen=True)
class Spent:
    """What one measurement took.

    Example:
        >>> Spent(passes=6000, seconds=4.2).of("passes")
        6000
    """

    passes: Natural
    seconds: float

    def of(self, unit: Unit) -> float:
        """Return it in the unit of a budget."""
        return self.passes if unit == "passes" else self.seconds


@dataclass(frozen=True)
class Ledger:
    """What a study has spent so far: a line in a file for each measurement, of all its processes.

    Example::

        ledger = Ledger(folder / "spent.jsonl")
        ledger.add(Spent(passes=6000, seconds=4.2))
    """

    file: Path

    def add(self, spent: Spent) -> None:
        """Add what a measurement took."""
        with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(vars(spent)) + "\n")

    def total(self) -> Spent:
        """Return what all measurements took."""
        if not self.file.exists():
            return Spent(0, 0.0)
        lines = [*read_json_lines(self.file, Spent)]
        return Spent(sum(each.passes for each in lines), sum(each.seconds for each in lines))


def rungs(num_images: int, count: int) -> list[int]:
    """Return the numbers of images of successive halving: each three times the one before.

    Example:
        >>> rungs(100, 3)
        [100, 300, 900]
    """
    return [num_images * 3**place for place in range(count)]


SEARCHED = 2 / 3
"""Share of the budget that is searched with; the rest confirms."""


def limits(count: int) -> list[float]:
    """Return up to which share of the budget each rung may draw.

    Every further rung has a third of the candidates, and two thirds of their images are new, so it
    is given two thirds of what the first rung is.

    Example:
        >>> [round(each, 2) for each in limits(3)]
        [0.29, 0.48, 0.67]
    """
    first = SEARCHED / (1 + (count - 1) * 2 / 3)
    return [first * (1 + place * 2 / 3) for place in range(count)]


def least(num_images: int, unguided: int, count: int) -> int:
    """Return the passes below which a study is too short to tell anything.

    The first rung then holds four candidates of twice the unguided passes.

    Example:
        >>> least(num_images=100, unguided=20, count=3)
        63000
    """
    return round(9 * num_images * unguided / limits(count)[0])
