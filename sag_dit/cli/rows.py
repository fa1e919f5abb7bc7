"""The rows of an evaluation: one per setting and seed, from a sweep, a comparison or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sag_dit.cli.composing import changed, compose
from sag_dit.cli.keys.evaluating import Evaluate
from sag_dit.cli.sweep import Choice, Value
from sag_dit.cli.values import MEASURED, make_terms
from sag_dit.output.charts import text_of


@dataclass(frozen=True, eq=False)
class Row:
    """One thing to measure: its name, what distinguishes it in a sweep, its configuration.

    ``source`` is a set of images on disk; None where they are drawn. Rows of one ``place`` differ
    in their seed alone.
    """

    name: str
    place: int
    axes: Mapping[str, Value]
    config: Evaluate
    source: str | None = None


def make_rows(config: Evaluate, choices: Sequence[Choice] | None) -> list[Row]:
    """Return the rows in the order of the table.

    Raises:
        ValueError: both or neither of samples and ckpt, or a value that cannot be meant.
        HydraException: a setting of the sweep cannot be composed.
    """
    if (config.samples is None) == (config.ckpt is None):
        given = f"samples={config.samples} and ckpt={config.ckpt}: "
        raise ValueError(
            ("" if config.samples is None else given)
            + "expected one of samples=FOLDER (or an npz, or [several]), to measure what is drawn, "
            "and ckpt=MODEL, to measure while drawing, such as ckpt=digits"
        )
    if choices is not None:
        rows = _swept(choices)
    elif config.samples is not None:
        sources = config.samples if isinstance(config.samples, list) else [config.samples]
        if not sources:
            raise ValueError("samples=[]: expected at least one folder or npz")
        rows = [Row(source, place, {}, config, source) for place, source in enumerate(sources)]
    elif config.compare and config.expected is None and _unguided(config):
        rows = _compared(config)
    else:
        rows = [Row("", 0, {}, config)]
    return _seeded(rows, config)


def _swept(choices: Sequence[Choice]) -> list[Row]:
    rows: list[Row] = []
    places: dict[str, int] = {}
    for choice in choices:
        config: Evaluate = compose("evaluate", choice.arguments)
        if isinstance(config.samples, list):
            raise ValueError(
                "-m: a sweep takes one set of samples; leave -m out to compare several"
            )
        # Settings that differ in their seed alone are one place of the table.
        axes = {key: value for key, value in choice.axes.items() if key != "seed"}
        place = places.setdefault(repr(axes), len(places))
        rows.append(Row("", place, axes, config, config.samples))
    return rows


def _unguided(config: Evaluate) -> bool:
    return all(term.off for term in make_terms(config.guidance).values())


def _compared(config: Evaluate) -> list[Row]:
    rows = []
    for place, (name, changes) in enumerate((config.compare or {}).items()):
        if not isinstance(changes, dict):
            raise ValueError(
                f"compare.{name}={changes}: expected a mapping of keys, such as {{sag_scale: 1.0}}"
            )
        try:
            rows.append(Row(name, place, {}, changed("evaluate", config, changes)))
        except ValueError as error:
            raise ValueError(f"compare.{name}: {error}") from error
    return rows


def _seeded(rows: Sequence[Row], config: Evaluate) -> list[Row]:
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


def name_rows(rows: Sequence[Row], guidance: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return what each row is called: its guidance and what else distinguishes it.

    ``guidance`` holds each row's active terms by name, None for images on disk.
    """
    names = []
    for row, terms in zip(rows, guidance, strict=True):
        parts = [] if terms is None else [guidance_text(terms) or "unguided"]
        parts += [
            f"{key} {text_of(value)}"
            for key, value in row.axes.items()
            if terms is None or not key.endswith("_scale")
        ]
        names.append(", ".join(parts) or row.name)
    # A comparison may vary what the guidance does not show.
    places = {
        name: {row.place for row, own in zip(rows, names, strict=True) if own == name}
        for name in names
    }
    return [
        f"{row.name}: {name}" if len(places[name]) > 1 and row.name else name
        for row, name in zip(rows, names, strict=True)
    ]


def guidance_text(guidance: Mapping[str, Mapping[str, Any]]) -> str:
    """Return active terms as one reads them, ``CFG 1.5 + SAG 0.5``; nothing without any."""
    texts = []
    for name, term in guidance.items():
        text = name.upper() if len(name) <= 3 else name
        if "scale" in term:
            text += f" {term['scale']:g}"
        if term.get("channels") is not None:
            text += f" on {term['channels']} channels"
        texts.append(text + _interval_text(term))
    return " + ".join(texts)


def _interval_text(term: Mapping[str, Any]) -> str:
    """Return where a term acts, nothing where it does throughout."""
    start, stop = term.get("interval", (0.0, 1.0))
    unit = term.get("interval_in", "progress")
    if unit == "progress":
        return "" if (start, stop) == (0.0, 1.0) else f" from {start:g} to {stop:g}"
    sides = "" if start is None else f" from {start:g}"
    sides += "" if stop is None else f" to {stop:g}" if sides else f" up to {stop:g}"
    return f"{sides} in {unit}" if sides else ""
