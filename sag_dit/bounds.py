"""Types and bounds of plain values, stated in dataclasses beside the code that reads them.

A schema is a dataclass. Its hints say what its keys hold, and :class:`Bounds` in them what numbers
and texts are allowed: ``Annotated[int, Bounds(least=1)]``. :func:`checked` makes an instance of it.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Schema = TypeVar("Schema")

SHOWN = 60
"""Characters of a wrong value that an error shows."""
MOST = 10**9
"""The greatest whole number that is meant where nothing tells what could be."""
LISTS: tuple[type, ...] = (list, tuple, Sequence)
MAPPINGS: tuple[type, ...] = (dict, Mapping)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a value may be within its type; of a list, what each of its values may be.

    Attributes:
        least: the smallest number.
        most: the greatest number.
        below: a number that the value has to stay below.
        expected: what an error says was expected; empty: words made from type and bounds.
        pattern: a regular expression that a text has to match as a whole.
        length: how many values a list has, or the numbers of them that it may have.
        refused: single numbers that are not allowed.
        folder: the text is a folder, and the root folder ``/`` is refused.
        exact: a whole number must not be written as a float, such as 3.0.
        blank: a text or list may be empty.
        lenient: for annotations that were not written as a schema: numbers may be infinite, and a
            type that is not understood takes any value.

    Example:
        >>> fit(-1, int, Bounds(least=0))
        (False, -1)
    """

    least: float | None = None
    most: float | None = None
    below: float | None = None
    expected: str = ""
    pattern: str = ""
    length: int | tuple[int, ...] | None = None
    refused: tuple[Any, ...] = ()
    folder: bool = False
    exact: bool = False
    blank: bool = True
    lenient: bool = False


ANY = Bounds()
Count = Annotated[int, Bounds(least=1, most=2**31)]
Natural = Annotated[int, Bounds(least=0, below=2**63)]
Share = Annotated[float, Bounds(least=0, most=1)]


def parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type."""
    union = get_origin(hint) in (Union, types.UnionType)
    return get_args(hint) if union else (hint,)


def is_function(kind: Any) -> bool:
    """Whether a type is that of functions.

    Example:
        >>> is_function(Callable[[int], int]), is_function(int)
        (True, False)
    """
    return Callable in (kind, get_origin(kind))


def shown(value: Any) -> str:
    """Return a value as a user would type it."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {shown(each)}' for name, each in value.items())}}}"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def fit(value: Any, hint: Any, told: Bounds = ANY) -> tuple[bool, Any]:
    """Return whether a value is of a type and within bounds, and the value as it is used."""
    # Of a number that may be whole or not, the one that it is.
    for kind in sorted(parts(hint), key=lambda kind: kind is not type(value)):
        fits, plain = _fit(value, kind, told)
        if fits:
            return True, plain
    return False, value


def _fit(value: Any, kind: Any, told: Bounds) -> tuple[bool, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True, value
    if origin is Annotated:
        return fit(value, *inner[:2])
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
    if origin is Literal:
        return (type(value), value) in [(type(each), each) for each in inner], value
    if origin in LISTS:
        return _fit_list(value, kind, told)
    if origin in MAPPINGS:
        if not isinstance(value, Mapping):
            return False, value
        found = {name: fit(each, inner[1], told) for name, each in value.items()}
        named = all(isinstance(name, str) for name in value)
        return named and all(fits for fits, _ in found.values()), value
    if is_function(kind):
        # A mapping may name one, which is told when it is made.
        return callable(value) or isinstance(value, Mapping), value
    return told.lenient, value


def _fit_list(value: Any, kind: Any, told: Bounds) -> tuple[bool, Any]:
    """Fit a list; one that is to be a tuple becomes one."""
    origin, inner = get_origin(kind), get_args(kind)
    if not isinstance(value, (list, tuple)) or not (value or told.blank):
        return False, value
    lengths = (told.length,) if isinstance(told.length, int) else told.length
    counted = lengths is None or len(value) in lengths
    if origin is not tuple or inner[-1] is Ellipsis:
        inner = inner[:1] * len(value)
    found = [fit(*each, told) for each in zip(value, inner, strict=False)]
    good = counted and len(inner) == len(value) and all(fits for fits, _ in found)
    used = [each for _, each in found]
    return good, value if not good else tuple(used) if origin is tuple else used


def _fit_number(value: Any, kind: type, told: Bounds) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, value
    if isinstance(value, float) and not math.isfinite(value):
        return told.lenient and kind is float and not math.isnan(value), value
    if kind is int and isinstance(value, float):
        if told.exact or not value.is_integer():
            return False, value
        value = int(value)
    least, below = told.least, told.below
    # Of a number that need not be whole, only what is said of it.
    most = None if kind is float and told.most == MOST else told.most
    within = (least is None or value >= least) and (most is None or value <= most)
    return within and (below is None or value < below) and value not in told.refused, value


def wanted(hint: Any, told: Bounds = ANY) -> str:
    """Return what a type and its bounds allow, in words."""
    if told.expected:
        return told.expected
    return ", or ".join(dict.fromkeys(_wanted(kind, told) for kind in parts(hint)))


def _wanted(kind: Any, told: Bounds) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return wanted(*inner[:2])
    if kind is type(None) or kind is None:
        return "null"
    if kind is bool:
        return "true or false"
    if kind is int or kind is float:
        return f"a{' whole' * (kind is int)} number{_bounds(kind, told)}"
    if kind is str:
        return "a folder of its own" if told.folder else "text"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in LISTS:
        several = {int: "whole numbers", float: "numbers", str: "names"}
        first = get_args(inner[0])[0] if get_origin(inner[0]) is Annotated else inner[0]
        fixed = len(inner) if origin is tuple and inner[-1] is not Ellipsis else told.length
        several_counts = fixed if isinstance(fixed, tuple) else (fixed,)
        count = "" if fixed is None else f"{' or '.join(map(str, several_counts))} "
        # Of an annotation, what can be written.
        plain = [each for each in parts(first) if each in several or not told.lenient]
        what = " or ".join(several.get(each, "mappings") for each in plain)
        within = _bounds(plain[0], told) if "number" in what else ""
        return f"a list of {count}{what or 'values'}{within}"
    if is_function(kind):
        return "a function, stated as {_target_: my_module.its_name, _partial_: true}"
    return "a mapping"


def _bounds(kind: Any, told: Bounds) -> str:
    least = "" if told.least is None else f"{told.least:,}"
    if told.below is not None:
        return f", {least} to less than {told.below:,}"
    if told.most is None or (kind is float and told.most == MOST):
        return f", {least} or more" if least else ""
    most = "2^64 - 1" if told.most == 2**64 - 1 else f"{told.most:,}"
    if told.most == MOST:
        return f", {least} or more, at most {most}" if least else f", at most {most}"
    return f", {least} to {most}"


@cache
def _hints_of(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def checked(
    values: Any, schema: type[Schema], where: str, *, prefix: str = "", open: bool = False
) -> Schema:
    """Return plain values as an instance of their schema, and so the mappings within them.

    Errors begin with ``where``, the file of the values, and name keys with ``prefix`` before them.
    Keys that the schema does not have are refused; with ``open`` they are left out instead.

    Raises:
        ValueError: a key is missing or unknown, or a value of another type or out of bounds.

    Example:
        >>> @dataclass
        ... class Blur:
        ...     sigma: Annotated[float, Bounds(least=0)]
        >>> checked({"sigma": 3}, Blur, "blur.json")
        Blur(sigma=3)
    """
    if not isinstance(values, Mapping):
        what = f"{prefix.rstrip('.')}={_short(values)}: " if prefix else ""
        raise ValueError(f"{where}: {what}expected a mapping, found a {type(values).__name__}")
    known = {each.name: each for each in fields(schema)}  # type: ignore[arg-type]
    hints = _hints_of(schema)  # type: ignore[arg-type]
    unknown = [] if open else [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"{where}: {prefix}{_short(unknown[0])} is no key of it: expected {', '.join(known)}"
        )
    used: dict[str, Any] = {}
    for name, each in known.items():
        if name in values:
            used[name] = _taken(values[name], hints[name], where, f"{prefix}{name}", open)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{where}: {prefix}{name} is missing: expected {wanted(hints[name])}")
    return schema(**used)


def _taken(value: Any, hint: Any, where: str, path: str, open: bool) -> Any:
    """Return the value of one key; mappings that have a schema become instances of it."""
    for kind in parts(hint):
        inner = get_args(kind)
        if is_dataclass(kind) and isinstance(kind, type) and value is not None:
            return checked(value, kind, where, prefix=f"{path}.", open=open)
        if get_origin(kind) in LISTS and isinstance(value, list) and is_dataclass(inner[0]):
            made = [_taken(v, inner[0], where, f"{path}.{i}", open) for i, v in enumerate(value)]
            return tuple(made) if get_origin(kind) is tuple else made
    fits, used = fit(value, hint)
    if not fits:
        raise ValueError(f"{where}: {path}={_short(value)}: expected {wanted(hint)}")
    return used


def _short(value: Any) -> str:
    try:
        text = shown(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
