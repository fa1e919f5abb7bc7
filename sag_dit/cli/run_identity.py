"""What determines the weights of a training run, and the folder that is named after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import is_open, keys_of, mapping_of, selected, walk
from sag_dit.cli.schema import determining, later_keys
from sag_dit.identity import Name, digest, name_of, plain, without_later
from sag_dit.output import claim

ANY = object()
"""Stands for whatever value a key has."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines the weights of a run, given all its values."""
    values = _copied(config)
    for key in determining("train", "nothing"):
        _drop(values, key)
    for key, value in later_keys("train").items():
        _drop(values, key, value)
    named: dict[str, Any] = _named(plain(values))
    return named


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copied(each) for name, each in value.items()}
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return [_copied(each) for each in value] if listed else value


def _drop(values: dict[str, Any], key: str, value: Any = ANY) -> None:
    """Take a key, its groups set apart by dots, out of values, if it has this value there."""
    *groups, name = key.split(".")
    for group in groups:
        values = values.get(group) or {}
    if name in values and (value is ANY or values[name] == value):
        del values[name]


def _named(value: Any) -> Any:
    """Return values with every ``_target_`` by its key, and without what it takes since later."""
    if isinstance(value, list):
        return [_named(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    values = {name: _named(each) for name, each in value.items()}
    target = values.get("_target_")
    if not isinstance(target, str):
        return values
    try:
        thing = resolve_name(target)
    except Exception:  # What cannot be imported is refused, with the reason, when it is made.
        return values
    name = name_of(thing, otherwise=target)
    # A class has several paths, of which the hash of this run may have had any.
    former = sorted(name.former, key=lambda path: path != target)
    return {**without_later(values, thing), "_target_": Name(name, former)}


def recorded(folder: Path) -> dict[str, Any]:
    """Return what a run's folder records, see :func:`sag_dit.output.claim.recorded`.

    Raises:
        ValueError: a group of keys is none there.
    """
    found = claim.recorded(folder)
    for name, value in found.get("config", {}).items():
        hint, told = keys_of(Train).get(name, (Any, None))
        grouped = told is not None and (is_open(hint) or mapping_of(hint, told))
        if grouped and not isinstance(value, (Mapping, type(None))):
            raise ValueError(
                f"{folder / claim.CONFIG}: config.{name}={value!r:.60}: expected a mapping; mend "
                f"it, or choose another out"
            )
    return found


def run_folder(config: Mapping[str, Any]) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights.

    Runs had names before there were the keys that are ``unnamed``, so the name tells of them only
    where the first one is taken by a run that differs in them.
    """
    if config["out"]:
        return Path(config["out"])
    values = identity(config)
    unnamed = {key: selected(config, key) for key in _unnamed()}
    for key in unnamed:
        _drop(values, key)
    first = _named_folder(config, values)
    there = recorded(first).get("config", {})
    if all(_held(there, key, value) == value for key, value in unnamed.items()):
        return first
    for key, value in unnamed.items():
        *groups, name = key.split(".")
        selected(values, ".".join(groups))[name] = value
    return _named_folder(config, values)


def _named_folder(config: Mapping[str, Any], values: dict[str, Any]) -> Path:
    return Path("outputs/train") / f"{config['name']}-{digest(values)[:8]}"


def _unnamed() -> list[str]:
    return [path for path, _, told in walk(Train) if told.unnamed]


def _held(config: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """Return a key's value in a recorded configuration."""
    group, _, name = key.rpartition(".")
    return (selected(config, group) or {}).get(name, otherwise)


def go_on_as_begun(config: Train, out: Path) -> Train:
    """Return the configuration without the ``unnamed`` keys that the run in a folder did not know.

    Their values mean what it did.
    """
    there = recorded(out).get("config", {})
    for key in _unnamed():
        group, _, name = key.rpartition(".")
        if group in there and name not in there[group]:
            inside = getattr(config, group)
            kept = tuple(each for each in inside.stated if each != name)
            later = next(told.later for path, _, told in walk(Train) if path == key)
            changed = {name: later, "stated": kept}
            config = replace(config, **{group: replace(inside, **changed)})
    return config
