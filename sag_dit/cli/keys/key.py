"""What is known of a key, and of the mappings that hold keys: the language of declarations."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

Determines = Literal["model", "pixels", "weights", "nothing"]

UNSET = object()


@dataclass(frozen=True)
class Key:
    """What is known of a key beside its type.

    ``words`` are what other programs call it. ``text`` may hold anything, so that Hydra's grammar
    must not read it. ``absent`` keys come with a choice or an experiment. ``later`` is the value
    that means what runs did before there was the key.
    """

    help: str
    least: float | None = None
    most: float | None = None
    below: float | None = None
    expected: str = ""
    pattern: str = ""
    length: int | None = None
    refused: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    determines: Determines = "pixels"
    text: bool = False
    folder: bool = False
    exact: bool = False
    absent: bool = False
    later: Any = UNSET


class Open:
    """A mapping that takes more keys than are declared, none of which has to be there."""

    asks: ClassVar[tuple[str, ...]] = ()
    """Whose arguments further keys are, where no ``_target_`` tells."""

    @classmethod
    def asked(cls) -> tuple[str, ...]:
        """Return whose arguments further keys are."""
        return cls.asks


@dataclass
class AnyKeys(Open):
    """A mapping of which nothing is known here."""


@cache
def keys_of(schema: type) -> dict[str, tuple[Any, Key]]:
    """Return the declared keys of a schema: name -> type and what is known of it."""
    hints = get_type_hints(schema, include_extras=True)
    annotated = {each.name: get_args(hints[each.name]) for each in fields(schema)}
    return {name: (hint, told) for name, (hint, told) in annotated.items()}


def parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type."""
    union = get_origin(hint) in (Union, types.UnionType)
    return get_args(hint) if union else (hint,)


def mapping_of(hint: Any) -> type | None:
    """Return the schema of a key that holds a mapping, None for other keys."""
    found = (each for each in parts(hint) if isinstance(each, type) and is_dataclass(each))
    return next(found, None)


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Key]]:
    """Yield every declared key by its path, mappings before what they hold."""
    for name, (hint, known) in keys_of(schema).items():
        yield f"{prefix}{name}", hint, known
        inner = mapping_of(hint)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.")
