"""Key and Closed: how the schema of a command declares its keys, and how schemas are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sag_dit.bounds import MOST, Bounds, parts

Determines = Literal["model", "pixels", "weights", "nothing"]

UNSET = object()

HELD_OUT = "held-out images"
"""What a key needs that acts on validation alone."""


@dataclass(frozen=True)
class Key(Bounds):
    """What is known of a key beside its type and bounds.

    Attributes:
        help: what it means, as ``--help`` and errors say it.
        words: what other programs call it, separated by spaces.
        determines: what of a run depends on it; None: the same as of the mapping around it.
        text: it may hold any text, so Hydra's grammar must not read it.
        names: as ``text``, but its values may be numbers too.
        blank: it may be an empty text or list.
        absent: it need not be set: a choice of a group or an experiment brings it.
        added: it stands in no YAML file, and is recorded only if the user states it.
        later: of a key that is newer than some runs, the value that means what those runs did.
        unnamed: its value is left out of the first name of a run's folder.
        named_before: it determined weights once, so that older runs are named after it too.
        keys: of an open mapping, the schema of the keys that have bounds of their own.
        asks: of an open mapping without ``_target_``, returns the paths of the classes or
            functions whose arguments it takes.
        around: of an open mapping, the class that takes what its ``_target_`` makes if that is of
            another kind than expected, and the arguments that the target does not take.
        by_checkpoint: where a run starts from a checkpoint, the checkpoint decides it.
        published: published numbers are only compared with runs that agree in it.
        every: the key that says every how many steps of training it acts, or "a or b" for the
            first that is no null.
        needs: the keys without which it acts on nothing, such as "a or b", or :data:`HELD_OUT`.

    Example:
        >>> key("how many", least=1).metadata["key"].least
        1
    """

    help: str
    _: KW_ONLY
    words: str = ""
    determines: Determines | None = None
    text: bool = False
    names: bool = False
    blank: bool = False
    most: float | None = MOST
    absent: bool = False
    added: bool = False
    later: Any = UNSET
    unnamed: bool = False
    named_before: bool = False
    keys: type | None = None
    asks: Callable[[], Sequence[str]] = tuple
    around: str = ""
    by_checkpoint: bool = False
    published: bool = False
    every: str = ""
    needs: tuple[str, ...] = ()


def key(told: str, **known: Any) -> Any:
    """Return the field of a schema that declares a key; ``known`` are the fields of :class:`Key`.

    Example:
        >>> @dataclass(kw_only=True)
        ... class Blur(Closed):
        ...     sigma: float = key("how much", least=0)
        >>> [path for path, *_ in walk(Blur)]
        ['sigma']
    """
    return field(metadata={"key": Key(told, **known)})


Open = dict[str, Any]
"""A mapping that takes more keys than are declared, none of which has to be there."""
Parts = dict[str, Open | None]
"""Such a mapping of mappings."""


@dataclass(kw_only=True)
class Closed:
    """A mapping whose keys are all declared; the class is its schema, an instance has its values.

    Example:
        >>> from sag_dit.cli.composing import compose
        >>> compose("sample", ["steps=20"]).steps
        20
    """

    stated: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The keys that were composed, in their order, as a run records them; the others are null."""
    source: Any = field(default=None, repr=False, compare=False)
    """Of a command, what :func:`~sag_dit.cli.composing.changed` begins with."""
    typed: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of a command, what its user stated as it was written, by the paths of the keys."""

    def states(self, path: str) -> bool:
        """Whether the user of a command has stated a key, or one within it, or all around it."""
        return any(
            f"{each}.".startswith(f"{path}.") or f"{path}.".startswith(f"{each}.")
            for each in self.typed
        )

    def unset(self, missing: Sequence[str]) -> str:
        """Return the error for keys that a command needs and that are not set."""
        told = {path: each.help for path, _, each in walk(type(self))}
        return f"{missing[0]} is not set: expected {missing[0]}=..., {told.get(missing[0], 'any')}"


@cache
def keys_of(schema: Any) -> dict[str, tuple[Any, Key]]:
    """Return the declared keys of a schema: name -> type and what is known of it."""
    hints = get_type_hints(schema)
    declared = (each for each in fields(schema) if "key" in each.metadata)
    return {each.name: (hints[each.name], each.metadata["key"]) for each in declared}


def held_by(hint: Any) -> Any:
    """Return what the keys hold of a mapping that takes more than are declared, else None."""
    return next((get_args(kind)[1] for kind in parts(hint) if get_origin(kind) is dict), None)


def is_open(hint: Any) -> bool:
    """Whether a key holds a mapping that takes more keys than are declared."""
    return held_by(hint) is not None


def mapping_of(hint: Any, told: Key) -> type | None:
    """Return the schema of a key that holds a mapping, None where there is none."""
    found = (each for each in parts(hint) if isinstance(each, type) and is_dataclass(each))
    return next(found, told.keys)


def walk(
    schema: type, prefix: str = "", determines: Determines = "pixels"
) -> Iterator[tuple[str, Any, Key]]:
    """Yield every declared key with its path, each mapping before its own keys."""
    for name, (hint, told) in keys_of(schema).items():
        own = told.determines or determines
        yield f"{prefix}{name}", hint, replace(told, determines=own)
        inner = mapping_of(hint, told)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.", own)


def to_dict(config: Any) -> Any:
    """Return a checked configuration as plain values, in the order in which it was composed."""
    if not isinstance(config, Closed):
        return config
    return {name: to_dict(getattr(config, name)) for name in config.stated}


def substituted(value: Any, old: str, new: str) -> Any:
    """Return plain values with a text in place of another wherever it stands."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return {name: substituted(each, old, new) for name, each in value.items()}
    return [substituted(each, old, new) for each in value] if isinstance(value, list) else value


def selected(values: Any, path: str) -> Any:
    """Return what stands at a path in plain values, None where nothing does."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
