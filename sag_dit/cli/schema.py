"""What Hydra composed against its command's schema, before anything heavy is imported.

The schemas lie in ``cli/keys``: a dataclass for each command. What passes is an instance of it,
whose closed mappings are instances too. Open mappings stay dictionaries; their further keys are
those that their ``_target_`` takes.
"""

from __future__ import annotations

import collections.abc
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import (
    MOST,
    UNSET,
    Determines,
    Key,
    is_open,
    keys_of,
    mapping_of,
    parts,
    walk,
)

LISTS = (list, tuple, collections.abc.Sequence)


def shown(value: Any) -> str:
    """Return a value as one types it."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {shown(each)}' for name, each in value.items())}}}"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
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
    return _checked(COMMANDS[command], False, values, "", typed or {}, unset)


def _checked(
    schema: type | None,
    opened: bool,
    values: Mapping[str, Any],
    prefix: str,
    typed: Mapping[str, str],
    unset: Collection[str],
) -> Any:
    """Return a mapping as it is used: an instance of its schema, or a dictionary if it is open."""
    known = {} if schema is None else keys_of(schema)
    for name, value in values.items():
        if name not in known and not opened:
            raise ValueError(f"{prefix}{name}: no such key")
        if name not in known:
            _refuse_nan(f"{prefix}{name}", value, typed)
    # Mappings come last, so that what is wrong in a line of its own is told first.
    used, nested = dict(values), []
    for name, (hint, told) in known.items():
        path = f"{prefix}{name}"
        if name not in values:
            if opened or told.absent:
                continue
            if type(None) not in parts(hint):
                text = f"~{path}" if f"~{path}" in typed else f"{path}=null"
                raise ValueError(f"{text}: expected {wanted(hint, told, path)}")
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
            raise ValueError(f"{path}={text}: expected {wanted(hint, told, path)}")
    for name in nested:
        hint, told = known[name]
        inner, start = mapping_of(hint, told), f"{prefix}{name}."
        used[name] = _checked(inner, is_open(hint), values[name], start, typed, unset)
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


def fit(value: Any, hint: Any, told: Key) -> tuple[bool, Any]:
    """Return whether a value is of a type and within bounds, and the value as it is used."""
    # Of a number that may be whole or not, the one that it is.
    for kind in sorted(parts(hint), key=lambda kind: kind is not type(value)):
        fits, plain = _fit(value, kind, told)
        if fits:
            return True, plain
    return False, value


def _fit(value: Any, kind: Any, told: Key) -> tuple[bool, Any]:
    if kind is Any:
        return True, value
    if kind is None or kind is type(None):
        return value is None, value
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int or kind is float:
        return _fit_number(value, kind, told)
    if kind is str:
        if not isinstance(value, str) or (told.folder and Path(value).resolve() == Path("/")):
            return False, value
        if not value and not told.blank:
            return False, value
        return not told.pattern or re.fullmatch(told.pattern, value) is not None, value
    if get_origin(kind) is Literal:
        return (type(value), value) in [(type(each), each) for each in get_args(kind)], value
    if get_origin(kind) in LISTS:
        return _fit_list(value, kind, told)
    # A schema's mappings are looked into by themselves; of another class a value says nothing.
    return not (is_open(kind) or mapping_of(kind, told)), value


def _fit_list(value: Any, kind: Any, told: Key) -> tuple[bool, Any]:
    if not isinstance(value, list) or not (value or told.blank):
        return False, value
    inner = get_args(kind)
    several = get_origin(kind) is not tuple or inner[-1] is ...
    length = told.length if several else len(inner)
    if length is not None and len(value) != length:
        return False, value
    found = [fit(each, inner[0 if several else place], told) for place, each in enumerate(value)]
    return all(fits for fits, _ in found), [used for _, used in found]


def _fit_number(value: Any, kind: type, told: Key) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return False, value
    if math.isinf(value) and told.most != math.inf:
        return False, value
    if kind is int and isinstance(value, float):
        if told.exact or not value.is_integer():
            return False, value
        value = int(value)
    least, most, below = told.least, told.most, told.below
    if kind is int and most is None:
        most = MOST
    within = (least is None or value >= least) and (most is None or value <= most)
    return within and (below is None or value < below) and value not in told.refused, value


def wanted(hint: Any, told: Key, path: str = "") -> str:
    """Return what a key takes, in words."""
    if told.expected:
        return told.expected
    return ", or ".join(dict.fromkeys(_wanted(kind, told, path) for kind in parts(hint)))


def _wanted(kind: Any, told: Key, path: str) -> str:
    if kind is type(None) or kind is None:
        return "null"
    if kind is bool:
        return "true or false"
    if kind is int or kind is float:
        return f"a{' whole' * (kind is int)} number{_bounds(kind, told)}"
    if kind is str:
        path = "a folder of its own" if told.folder else "a path or a name"
        return path if told.text and not told.blank else "text"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in LISTS:
        inner = get_args(kind)
        names = {int: "whole numbers", float: "numbers", str: "names"}
        of = " or ".join(names[each] for each in parts(inner[0]) if each in names) or "values"
        fixed = get_origin(kind) is tuple and inner[-1] is not ...
        counted = f"{len(inner) if fixed else told.length or ''} ".lstrip()
        return f"a list of {counted}{of}{_bounds(parts(inner[0])[0], told)}"
    inside = mapping_of(kind, told)
    first = next(iter(keys_of(inside)), None) if inside is not None else None
    return f"a mapping, such as {path}.{first}=..." if first and path else "a mapping"


def _bounds(kind: Any, told: Key) -> str:
    least = "" if told.least is None else f"{told.least:,}"
    if told.most == math.inf:
        return ""
    if told.below is not None:
        return f", {least} to less than {told.below:,}"
    if told.most is not None:
        return f", {least} to {'2^64 - 1' if told.most == 2**64 - 1 else f'{told.most:,}'}"
    most = f", at most {MOST:,}" * (kind is int)
    return f", {least} or more{most}" if least else most


class FreeText(NamedTuple):
    """How a key takes free text: as names, which may be numbers as well, and in lists."""

    names: bool
    listed: bool


@cache
def free_text() -> Mapping[str, FreeText]:
    """Return the keys of all commands whose values may hold anything."""
    found = (each for schema in COMMANDS.values() for each in walk(schema))
    return {
        path: FreeText(told.names, any(get_origin(kind) is list for kind in parts(hint)))
        for path, hint, told in found
        if told.text or told.names
    }


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a sentence that names the closest names, or nothing if none is close."""
    matches = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f"\nDid you mean {' or '.join(matches)}?" if matches else ""


def determining(command: str, *what: Determines) -> tuple[str, ...]:
    """Return the keys of a command that determine any of ``what``, by their paths."""
    return tuple(path for path, _, told in walk(COMMANDS[command]) if told.determines in what)


def later_keys(command: str) -> dict[str, Any]:
    """Return the keys that runs were made without, with the values that mean what those did.

    With such a value a key is left out of the identity, so that folders keep their names and runs
    go on. What a ``_target_`` takes its class tells itself, see :data:`sag_dit.identity.LATER`.
    """
    found = walk(COMMANDS[command])
    return {path: told.later for path, _, told in found if told.later is not UNSET}
