"""Results: the numbers of sets of images, kept under their identity, and combined over seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Any

from sag_dit.evaluation.expected import Expected
from sag_dit.files import atomic
from sag_dit.study.variance import difference
from sag_dit.untrusted import read_json_as

Value = float | int | str | bool | None

LAYOUT = 1
"""Has to change when numbers are computed or kept in another way, so that old ones are not used."""
FIRST_METRICS = frozenset({"fid", "sfid", "is", "precision", "recall"})
"""Metrics whose choice is part of a record's name.

Those that came later are not: a record that lacks one of them is completed and keeps its name.
"""


@dataclass(frozen=True)
class Metric:
    """How a metric is called, and whether more of it is better.

    Example:
        >>> Metric("FID", higher=False).title
        'FID ↓'
    """

    label: str
    higher: bool | None

    @property
    def title(self) -> str:
        """The label with the direction of the better."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher]
        return f"{self.label}{arrow}"


@dataclass(frozen=True)
class Record:
    """The numbers of one set of images, and the facts without which they mean nothing.

    ``spread`` holds the standard error of each metric, estimated from random halves of the images;
    it is empty if that was not asked for.

    Example:
        >>> Record({"fid": 12.0, "is": 9.0}, spread={}, facts={"seed": 0}).of(["fid"]).metrics
        {'fid': 12.0}
    """

    metrics: Mapping[str, float]
    spread: Mapping[str, float]
    facts: Mapping[str, Any]
    warnings: Sequence[str] = ()
    seconds: float = 0.0

    def of(self, metrics: Iterable[str]) -> Record:
        """Return the record of these metrics alone, in this order."""
        wanted = tuple(metrics)
        return replace(
            self,
            metrics={name: self.metrics[name] for name in wanted},
            spread={name: self.spread[name] for name in wanted if name in self.spread},
        )

    def completed(self, further: Record) -> Record:
        """Return the record with metrics that were measured later; what is known stays."""
        return Record(
            metrics={**further.metrics, **self.metrics},
            spread={**further.spread, **self.spread},
            facts={**further.facts, **self.facts},
            warnings=list(dict.fromkeys((*self.warnings, *further.warnings))),
            seconds=self.seconds + further.seconds,
        )


@dataclass(frozen=True)
class _Kept:
    """A record as it stands in its file, where a number that is not finite is null."""

    metrics: Mapping[str, float | None]
    spread: Mapping[str, float | None]
    facts: Mapping[str, Any]
    warnings: Sequence[str] = ()
    seconds: float = 0.0


def identity_of(determining: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """Return the name under which numbers are kept: a hash of all that determines them."""
    named = sorted(FIRST_METRICS.intersection(metrics))
    text = json.dumps(
        _canonical({**determining, "metrics": named, "layout": LAYOUT}), sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """Return the same values with 1.0 written as 1, since a scale may be typed either way."""
    if isinstance(value, Mapping):
        return {key: _canonical(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_record(folder: Path, identity: str) -> Record | None:
    """Return what was measured under an identity, None if nothing was.

    Raises:
        ValueError: the file cannot be read.
    """
    file = folder / f"{identity}.json"
    if not file.exists():
        return None
    try:
        return Record(**vars(read_json_as(file, _Kept)))
    except ValueError as error:
        raise ValueError(f"{error}; delete it and repeat the command to measure again") from None


def write_record(folder: Path, identity: str, record: Record) -> None:
    """Keep what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{identity}.json", asdict(record))


@dataclass(frozen=True)
class Result:
    """One setting of the table: one record, or the mean of several that only differ in their seed.

    With several seeds ``spread`` is the standard deviation over them, and ``change`` the mean
    difference from the setting ``against``, with its standard error; see :func:`compared`.
    ``expected`` holds published numbers, and ``deviations`` lists what differs from how they were
    made.

    Example:
        >>> first = Record({"fid": 12.0}, spread={}, facts={"seed": 0})
        >>> second = Record({"fid": 14.0}, spread={}, facts={"seed": 1})
        >>> combine("SAG 0.5", {}, {"1f3a": first, "9c0b": second}).metrics
        {'fid': 13.0}
    """

    name: str
    axes: Mapping[str, Value]
    metrics: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    seeds: Sequence[Mapping[str, Any]] = ()
    identities: Sequence[str] = ()
    against: str | None = None
    change: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    expected: Expected | None = field(default=None, compare=False)
    deviations: Sequence[str] = ()

    @property
    def trainings(self) -> int:
        """How many trained models the records are of."""
        return len({each.get("training", 0) for each in self.seeds})

    def runs(self, metric: str) -> dict[int, dict[int, float]]:
        """Return a metric by training and sampling seed; see :mod:`sag_dit.study.variance`."""
        found: dict[int, dict[int, float]] = {}
        for each in self.seeds:
            value = _or_nan(each["metrics"][metric])
            found.setdefault(each.get("training", 0), {})[each["seed"]] = value
        return found


def _or_nan(value: float | None) -> float:
    """Return a metric as a number: JSON keeps what is not finite as null."""
    return math.nan if value is None else value


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation, not a number where a value is not finite."""
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def combine(name: str, axes: Mapping[str, Value], records: Mapping[str, Record]) -> Result:
    """Combine the records of one setting, given by their identities, into its result."""
    all_of = list(records.values())
    first = all_of[0]
    metrics, spread = dict(first.metrics), dict(first.spread)
    facts = dict(first.facts)
    if len(all_of) > 1:
        values = {key: [_or_nan(each.metrics[key]) for each in all_of] for key in first.metrics}
        metrics = {key: sum(each) / len(each) for key, each in values.items()}
        spread = {key: deviation(each) for key, each in values.items()}
        facts["seed"] = [each.facts.get("seed") for each in all_of]
    # Several trainings are told apart by their weights, in the order in which they come.
    weights = [each.facts.get("weights_sha256") for each in all_of]
    trainings = [*dict.fromkeys(weights)]
    if len(trainings) > 1:
        facts["model"] = [*dict.fromkeys(each.facts.get("model") for each in all_of)]
        facts["weights_sha256"] = trainings
    several = [
        {"training": trainings.index(each)} if len(trainings) > 1 else {} for each in weights
    ]
    return Result(
        name=name,
        axes=dict(axes),
        metrics=metrics,
        spread=spread,
        facts=facts,
        warnings=list(dict.fromkeys(text for each in all_of for text in each.warnings)),
        seeds=[
            {**training, "seed": each.facts.get("seed"), "metrics": dict(each.metrics)}
            for training, each in zip(several, all_of, strict=True)
        ],
        identities=list(records),
    )


def compared(results: Sequence[Result], against: str | None) -> list[Result]:
    """Return the results with what each changes against one of them, by default the first.

    d = mean_i(m_i - b_i) and its standard error, stdev_i(m_i - b_i) / sqrt(n), over n seeds i.
    Settings of one seed share their noise and latents, so most of what varies from seed to seed is
    in both and cancels. Settings are not compared if their seeds differ, or if there is only one.
    With several trainings of a model d is the mean over them of the mean over seeds, and its error
    is that over trainings; see :func:`sag_dit.study.variance.difference`.
    """
    base = next(each for each in results if against in (None, each.name))
    return [each if each is base else replace(each, **_change(each, base)) for each in results]


def _change(result: Result, base: Result) -> dict[str, Any]:
    pairs = list(zip(result.seeds, base.seeds, strict=False))
    seeds = [[(each.get("training"), each["seed"]) for each in r.seeds] for r in (result, base)]
    if seeds[0] != seeds[1] or len(pairs) < 2:
        return {}
    change = {}
    for name in result.metrics:
        if name not in base.metrics:
            continue
        if result.trainings > 1:
            told = difference(result.runs(name), base.runs(name))
            assert told is not None
            change[name] = (told.mean, told.error)
            continue
        differences = [_or_nan(a["metrics"][name]) - _or_nan(b["metrics"][name]) for a, b in pairs]
        error = deviation(differences) / math.sqrt(len(pairs))
        change[name] = (sum(differences) / len(pairs), error)
    return {"against": base.name, "change": change}


def flat_row(result: Result, metrics: Iterable[str]) -> dict[str, Any]:
    """Return a result as one row of a table: metrics, their ± and changes, and all facts."""
    row: dict[str, Any] = {"setting": result.name, **result.axes}
    for name in metrics:
        row[name] = result.metrics.get(name)
        if name in result.spread:
            row[f"{name}_spread"] = result.spread[name]
        if name in result.change:
            row[f"{name}_change"], row[f"{name}_change_error"] = result.change[name]
    return row | dict(flat_facts(result.facts))


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield nested facts by their keys joined with dots; lists as JSON."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write values that JSON knows; a number that is not finite becomes null."""
    with atomic(file) as temporary:
        text = json.dumps(json_values(values), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def json_values(value: Any) -> Any:
    """Return JSON values; a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): json_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
