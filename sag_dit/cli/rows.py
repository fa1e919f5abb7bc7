"""The rows of an evaluation: a setting, training and seed each, from a sweep or a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sag_dit.bounds import shown
from sag_dit.cli.composing import changed, compose
from sag_dit.cli.keys import Evaluate
from sag_dit.cli.schema import determining
from sag_dit.cli.sweep import Choice, Value
from sag_dit.cli.typed import keys_and_flags
from sag_dit.cli.values import MEASURED, make_terms

SHARED = ("samples", "seeds", "against", "confidence", "compare", "matched", "trainer")
"""What is said of all rows at once, beside the keys that determine nothing."""


@dataclass(frozen=True, eq=False)
class Configured:
    """A set of images to measure: its name, what distinguishes it in a sweep, its configuration.

    ``source`` is a set of images on disk; None where they are drawn. Rows of one ``place`` differ
    in their training and their seed alone. ``title`` is what the table calls them, where that does
    not follow from what they are.

    Example::

        for row in make_rows(config, choices=None):
            print(row.name, row.config.seed)
    """

    name: str
    place: int
    axes: Mapping[str, Value]
    config: Evaluate
    source: str | None = None
    title: str = ""


def make_rows(config: Evaluate, choices: Sequence[Choice] | None) -> list[Configured]:
    """Return the rows in the order of the table.

    Raises:
        ValueError: both or neither of samples and ckpt, or a value that cannot be meant.
        HydraException: a setting of the sweep cannot be composed.
    """
    if (config.samples is None) == (config.ckpt is None):
        listed = config.samples if isinstance(config.samples, list) else [config.samples]
        gone = [each for each in listed if each and not Path(each).expanduser().exists()]
        both = config.samples is not None
        raise ValueError(
            f"samples={shown(config.samples)} and ckpt={config.ckpt}: "
            * both
            + "expected one of samples=FOLDER (or an npz, or [several]), to measure what is drawn, "
            "and ckpt=MODEL, to measure while drawing, such as ckpt=digits"
            + (f"; there is no {gone[0]}" if gone else "")
        )
    _check_matched(config, choices is not None)
    if choices is not None:
        rows = _swept(choices)
    elif config.samples is not None:
        sources = config.samples if isinstance(config.samples, list) else [config.samples]
        rows = [
            Configured(source, place, {}, config, source) for place, source in enumerate(sources)
        ]
    elif config.compare and config.expected is None and _unguided(config):
        rows = _compared(config)
    else:
        rows = [Configured("", 0, {}, config)]
    return _seeded(_trained(rows), config)


def _check_matched(config: Evaluate, swept: bool) -> None:
    """Refuse matches where there is nothing to match, or no place for them."""
    if config.matched:
        told = f"matched={config.matched}"
        if config.samples is not None:
            raise ValueError(f"{told}: images on disk have no guidance to match; leave it out")
        if swept:
            raise ValueError(
                f"{told} beside -m: a sweep is a curve, which matches are no points of; compare "
                f"settings by +compare.NAME={{...}} instead"
            )
        if config.expected is not None:
            raise ValueError(f"{told}: a published row is compared with its paper; leave it out")


def _swept(choices: Sequence[Choice]) -> list[Configured]:
    rows: list[Configured] = []
    places: dict[str, int] = {}
    for choice in choices:
        config: Evaluate = compose("evaluate", keys_and_flags(choice.arguments)[0])
        if isinstance(config.samples, list):
            raise ValueError(
                "-m: a sweep takes one set of samples; leave -m out to compare several"
            )
        # Settings that differ in their seed alone are one place of the table.
        axes = {key: value for key, value in choice.axes.items() if key != "seed"}
        place = places.setdefault(repr(axes), len(places))
        rows.append(Configured("", place, axes, config, config.samples))
    return rows


def _unguided(config: Evaluate) -> bool:
    return all(term.off for term in make_terms(config.guidance).values())


def _compared(config: Evaluate) -> list[Configured]:
    rows = []
    shared = {*SHARED, *determining("evaluate", "nothing")}
    for place, (name, changes) in enumerate((config.compare or {}).items()):
        for key in changes:
            if key.partition(".")[0] in shared:
                raise ValueError(
                    f"compare.{name}.{key}: all rows have the same; set {key} beside compare"
                )
        try:
            rows.append(Configured(name, place, {}, changed("evaluate", config, changes)))
        except ValueError as error:
            raise ValueError(f"compare.{name}: {error}") from error
    return rows


def _trained(rows: Sequence[Configured]) -> list[Configured]:
    """Return a row for each training of a model."""
    found = []
    for row in rows:
        listed = row.config.ckpt
        names: list[str | None] = [*listed] if isinstance(listed, list) else [listed]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None or not names:
            raise ValueError(f"ckpt={shown(listed)}: expected several trainings, each once")
        found += [replace(row, config=replace(row.config, ckpt=name)) for name in names]
    return found


def _seeded(rows: Sequence[Configured], config: Evaluate) -> list[Configured]:
    seeds = config.seeds
    if seeds > 1 and config.samples is not None:
        raise ValueError(f"seeds={seeds}: images on disk have theirs; leave it out")
    seeded = []
    for row in rows:
        for number in range(seeds):
            own = row.config
            if row.source is None:
                count = own.num_images or MEASURED
                own = replace(own, seed=own.seed + number, num_images=count)
            seeded.append(replace(row, config=own))
    return seeded
