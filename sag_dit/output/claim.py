"""A folder belongs to one set of settings, which stand in its ``config.yaml``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from sag_dit.bounds import checked
from sag_dit.files import atomic
from sag_dit.identity import agree, written
from sag_dit.untrusted import read_yaml

CONFIG = "config.yaml"
BESIDE = ("parent", "changed")
"""What a folder may tell beside its settings: the run it goes on from, and what has changed since
it began."""
LONGEST = 120
"""Characters of a value that a difference shows."""


@dataclass(frozen=True)
class _Claimed:
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    parent: Mapping[str, Any] | None = None
    changed: list[Any] | None = None


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    what: str,
    remedy: str = "",
    free: Collection[str] = (),
) -> None:
    """Make a folder belong to ``settings``, or find that it does.

    ``remedy`` is what else can be done where it does not. The keys in ``free`` may differ: they
    are of a folder from a time in which they determined its results.

    ``settings``, an identity, determines the results; ``config`` is the whole configuration; both
    are written, unless the folder is this one and cannot be written to. A folder whose settings
    have former names of what has a key now is recognised.

    Raises:
        ValueError: the folder holds results of other settings; the differences are named.
    """
    file = folder / CONFIG
    if file.exists():
        differences = differing(recorded(folder).get("settings", {}), settings, free)
        if differences:
            raise ValueError(
                f"out={folder} holds {what} of other settings:\n  "
                + "\n  ".join(differences)
                + f"\nChoose another out, state no out, or repeat the former settings{remedy}"
            )
        if not os.access(folder, os.W_OK):
            return
    before = recorded(folder)
    beside = {name: before[name] for name in BESIDE if before.get(name)}
    _write(file, {"settings": written(settings), "config": dict(config), **beside})


def note(folder: Path, **beside: Any) -> None:
    """Write down what stands beside a folder's settings, one of :data:`BESIDE`.

    Example::

        note(Path("outputs/train/RUN"), changed=[{"step": 100, "keys": {"max_steps": [100, 200]}}])
    """
    there = {name: value for name, value in recorded(folder).items() if value}
    _write(folder / CONFIG, there | written(beside))


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with atomic(file) as temporary:
        temporary.write_text(
            yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def recorded(folder: Path) -> dict[str, Any]:
    """Return what a folder's ``config.yaml`` says; nothing if there is none.

    Raises:
        ValueError: the file cannot be read, or is none of ours.
    """
    file = folder / CONFIG
    if not file.exists():
        return {}
    return dict(vars(checked(read_yaml(file), _Claimed, str(file), open=True)))


MISSING = object()
"""Stands for the value of a key that is not there."""


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Return in which values two sets of settings differ, a text for each; ``free`` keys may.

    A mapping and the list of it alone mean the same.

    Example:
        >>> differing({"data": {"size": 8}}, {"data": {"size": 16}})
        ['data.size: there 8, now 16']
        >>> differing({"parts": [{"a": 1}, {"a": 2}]}, {"parts": [{"a": 1}, {"a": 3}]})
        ['parts[1].a: there 2, now 3']
    """
    return sorted(_differing(before, now, "", free))


def _differing(before: Any, now: Any, path: str, free: Collection[str]) -> Iterator[str]:
    if path in free:
        return
    if isinstance(before, list) and isinstance(now, Mapping):
        now = [now]
    if isinstance(before, Mapping) and isinstance(now, list):
        before = [before]
    # Into mappings, also where a whole group is not there.
    there = [each for each in (before, now) if each is not MISSING]
    group = all(isinstance(each, Mapping) for each in there) and not path.endswith("]")
    if group or all(isinstance(each, Mapping) for each in (before, now)):
        old, new = ({} if each is MISSING else each for each in (before, now))
        for key in {**old, **new}:
            inner = f"{path}.{key}".lstrip(".")
            yield from _differing(old.get(key, MISSING), new.get(key, MISSING), inner, free)
        return
    # Into lists of what has parts itself.
    lists = all(isinstance(each, list) for each in (before, now))
    if lists and any(isinstance(each, (Mapping, list)) for each in (*before, *now)):
        for place, (old, new) in enumerate(zip_longest(before, now, fillvalue=MISSING)):
            yield from _differing(old, new, f"{path}[{place}]", free)
        return
    if not agree(before, now):
        old, new = ("not set" if each is MISSING else str(each) for each in (before, now))
        yield f"{path}: there {short(old)}, now {short(new)}"


def short(text: str) -> str:
    """Return the beginning of a text that is too long for a line.

    Example:
        >>> short("one line")
        'one line'
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
