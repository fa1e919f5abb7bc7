"""What Hydra composed against its command's schema, before anything heavy is imported.

The schemas lie in ``cli/keys``: a dataclass for each command. What passes is an instance of it,
whose closed mappings are instances too. Open mappings stay dictionaries; their further keys are
those that their ``_target_`` takes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple, get_origin

from sag_dit.bounds import fit, parts, shown, wanted
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import (
    HELD_OUT,
    UNSET,
    Closed,
    Determines,
    Key,
    held_by,
    is_open,
    keys_of,
    mapping_of,
    selected,
    to_dict,
    walk,
)


def check(
    command: str,
    values: Mapping[str, Any],
    typed: Mapping[str, str] | None = None,
    unset: Collection[str] = (),
) -> Any:
    """Return what a command is told as an instance of its schema; whole floats as whole numbers.

    ``typed`` holds values as the user wrote them, for the message; keys that are ``unset`` are let
    pass.

    Raises:
        ValueError: a key that there is not, or a value of another type or out of bounds.

    Example::

        check("encode", {"data": {"root": "photos", "size": 0}})
    """
    return _checked(COMMANDS[command], None, values, "", typed or {}, unset)


def _checked(
    schema: type | None,
    opened: Any,
    values: Mapping[str, Any],
    prefix: str,
    typed: Mapping[str, str],
    unset: Collection[str],
) -> Any:
    """Return a mapping as it is used: an instance of its schema, or a dictionary if it is open.

    ``opened`` is what the further keys of an open one hold, None of one that is closed.
    """
    known = {} if schema is None else keys_of(schema)
    for name, value in values.items():
        if name not in known and not opened:
            raise ValueError(f"{prefix}{name}: no such key")
        if name not in known:
            path = f"{prefix}{name}"
            _refuse_nan(path, value, typed)
            if not fit(value, opened)[0]:
                text = typed.get(path, shown(value))
                raise ValueError(f"{path}={text}: expected {wanted(opened)}")
    # Mappings come last, so that what is wrong in a line of its own is told first.
    used, nested = dict(values), []
    for name, (hint, told) in known.items():
        path = f"{prefix}{name}"
        if name not in values:
            if opened or told.absent:
                continue
            if type(None) not in parts(hint):
                text = f"~{path}" if f"~{path}" in typed else f"{path}=null"
                raise ValueError(f"{text}: expected {expected(hint, told, path)}")
            used[name] = None
            continue
        value = values[name]
        # A group of which nothing is chosen is an empty mapping.
        if path in unset or (value == {} and type(None) in parts(hint)):
            continue
        if isinstance(value, dict) and (is_open(hint) or mapping_of(hint, told)):
            nested.append(name)
            continue
        fits, used[name] = fit(value, hint, told)
        if not fits:
            text = typed.get(path, shown(value))
            raise ValueError(f"{path}={text}: expected {expected(hint, told, path)}")
    for name in nested:
        hint, told = known[name]
        inner, start = mapping_of(hint, told), f"{prefix}{name}."
        used[name] = _checked(inner, held_by(hint), values[name], start, typed, unset)
    if opened or schema is None:
        return used
    absent = {
        name: None if told.later is UNSET else told.later
        for name, (_, told) in known.items()
        if told.absent
    }
    return schema(**{**absent, **used}, stated=tuple(values))


def _refuse_nan(path: str, value: Any, typed: Mapping[str, str]) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{path}={typed.get(path, 'nan')}: expected a number, which NaN is not")
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_nan(f"{path}.{name}", each, typed)


def expected(hint: Any, told: Key, path: str) -> str:
    """Return what a key takes, in words; of a mapping, with a key that it has."""
    words = wanted(hint, told)
    if told.text and not (told.blank or told.folder or told.expected):
        words = words.replace("text", "a path or a name")
    inside = mapping_of(hint, told)
    first = next(iter(keys_of(inside)), None) if inside is not None else None
    example = f"a mapping, such as {path}.{first}=..."
    return words.replace("a mapping", example) if first and not told.expected else words


class FreeText(NamedTuple):
    """How a key takes free text: as names, which may be numbers as well, and in lists.

    Example:
        >>> free_text()["classes"]
        FreeText(names=True, listed=True)
    """

    names: bool
    listed: bool


@cache
def free_text() -> Mapping[str, FreeText]:
    """Return the keys of all commands whose values may hold anything."""
    found: dict[str, FreeText] = {}
    for schema in COMMANDS.values():
        for path, hint, told in walk(schema):
            if told.text or told.names:
                # A key that one command takes a list for is read alike by all.
                before = found.get(path, FreeText(names=False, listed=False))
                listed = any(get_origin(kind) is list for kind in parts(hint))
                found[path] = FreeText(told.names, listed or before.listed)
    return found


def determining(command: str, *what: Determines) -> tuple[str, ...]:
    """Return the keys of a command that determine any of ``what``, by their paths."""
    return tuple(path for path, _, told in walk(COMMANDS[command]) if told.determines in what)


def refuse_idle(config: Closed, *, validates: bool = True) -> None:
    """Refuse keys that a user has stated and that act on nothing beside the others.

    Without ``validates`` those as well that act on validation alone.

    Raises:
        ValueError: such a key, what it needs, and the remedy.

    Example:
        >>> from sag_dit.cli.composing import compose
        >>> try:
        ...     refuse_idle(compose("train", ["experiment=digits", "keep.snapshots=9"]))
        ... except ValueError as error:
        ...     print(str(error).partition(" ")[0])
        keep.snapshots=9
    """
    values = to_dict(config)
    for path, _, told in walk(type(config)):
        lacking = [need for need in told.needs if not _is_met(need, values, validates)]
        within = [each for each in config.typed if f"{each}.".startswith(f"{path}.")]
        for stated in within if lacking else ():
            value = selected(values, stated)
            # What asks for nothing is no mistake, such as keep.best=0 without validation.
            if value in (None, []) or (lacking[0] == HELD_OUT and not value):
                continue
            why, remedy = _told_lacking(lacking[0], values)
            raise ValueError(
                f"{stated}={shown(value)} acts on nothing, since {why}: leave {stated} out, or "
                f"{remedy}"
            )


def _is_met(need: str, values: Mapping[str, Any], validates: bool) -> bool:
    """Whether there is what a key needs to act, as :class:`Key` says it."""
    if need == HELD_OUT:
        return validates
    return any(selected(values, key) for key in need.split(" or "))


def _told_lacking(need: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return in words what is not there, and what brings it."""
    if need == HELD_OUT:
        return "nothing is validated", "hold images out, as by data.held_out=0.1"
    key = need.partition(" or ")[0]
    there = selected(values, key)
    # A group of which nothing is chosen is an empty mapping.
    return f"{key} is {shown(None if there == {} else there)}", f"set {need} too"


def told_too_late(config: Closed, steps: int) -> list[str]:
    """Return a line for each key that a user has stated and that acts after the end of a run.

    It is no mistake, since a run of more steps goes on to where it acts.

    Example:
        >>> from sag_dit.cli.composing import compose
        >>> told_too_late(compose("train", ["experiment=digits", "keep.best=3"]), steps=10)
        ['note: keep.best acts every 1,000 steps (every_n_steps.validation), and the run has 10']
    """
    values, lines = to_dict(config), []
    for path, _, told in walk(type(config)):
        found = {each: selected(values, each) for each in told.every.split(" or ") if each}
        key, every = next((each for each in found.items() if each[1] is not None), ("", 0))
        stated = [each for each in config.typed if f"{each}.".startswith(f"{path}.")]
        lines += [
            f"note: {each} acts every {every:,} steps{f' ({key})' * (each != key)}, and the run "
            f"has {steps:,}"
            for each in stated
            if every > steps
        ]
    return lines


def later_keys(command: str) -> dict[str, Any]:
    """Return the keys that runs were made without, with the values that mean what those did.

    With such a value a key is left out of the identity, so that folders keep their names and runs
    go on. What a ``_target_`` takes its class tells itself, see :data:`sag_dit.identity.LATER`.
    """
    found = walk(COMMANDS[command])
    return {path: told.later for path, _, told in found if told.later is not UNSET}
