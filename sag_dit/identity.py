"""Identities: what determines the results of a run, as plain values to write, hash and compare.

The folder of a run is named after a hash of its identity, and a run refuses a folder of another
identity. So the identity of a run must not change when code does. Two rules see to that:

- An identity names a class by its ``key``, not by its module. Before there were keys it named the
  module; a class of that time lists its old names as ``former``. Hashes are still computed with the
  first old name, so folders keep their names. A folder in which an old name is written is
  recognised.
- An option that is added to a class is marked :data:`LATER`. While it has its default, it is left
  out of the identity.
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import nn

LATER: Mapping[str, Any] = MappingProxyType({"later": True})
"""Marks a dataclass field that is newer than some runs: ``field(default=0, metadata=LATER)``.

Its default has to mean what those runs did; identities leave it out at that value. A class that is
no dataclass lists such arguments and their defaults in a class attribute,
``later = {"workers": 0}``.
"""


class Name(str):
    """What an identity calls a class: its key.

    ``former`` holds the names that identities used for the class before it had a key. Hashes are
    computed with the first of them.

    Example:
        >>> Name("sag", ("old.SAG",)).former
        ('old.SAG',)
    """

    former: tuple[str, ...]

    def __new__(cls, key: str, former: Sequence[str] = ()) -> Self:
        """Return the key as a string that knows its former names."""
        name = super().__new__(cls, key)
        name.former = tuple(former)
        return name


def name_of(thing: Any, otherwise: str | None = None) -> Name:
    """Return what identities call a class or a function.

    That is the ``key`` that the class itself states; an inherited one does not count, since a
    subclass gives other results. Without a key it is ``otherwise``, by default the path of the
    code.

    Raises:
        ValueError: another class of the same kind has this key, such as the one it was copied from.

    Example:
        >>> class Sharpen:
        ...     key = "sharpen"
        >>> name_of(Sharpen)
        'sharpen'
    """
    key, former = _own(thing)
    if key is None:
        return Name(otherwise or _path(thing))
    _refuse_twins(thing, {key, *former})
    return Name(key, former)


def _own(thing: Any) -> tuple[str | None, tuple[str, ...]]:
    """Return the key and the former names that a class states itself."""
    stated = getattr(thing, "__dict__", {})
    key, former = stated.get("key"), stated.get("former")
    if not isinstance(key, str):
        return None, ()
    # The default of a field that happens to be called key is an attribute of the class as well.
    if is_dataclass(thing) and "key" in {each.name for each in fields(thing)}:
        return None, ()
    return key, former if isinstance(former, tuple) else ()


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _refuse_twins(thing: Any, names: Set[str]) -> None:
    """Refuse names that another class of the same kind has: their runs would share a folder."""
    kinds = [base for base in getattr(thing, "__mro__", ()) if base not in (ABC, object)]
    seen = set(kinds)
    while kinds:
        new = set(type.__subclasses__(kinds.pop())) - seen
        seen |= new
        kinds += new
    for other in seen - {thing}:
        key, former = _own(other)
        shared = names & {key, *former}
        # A class that was made anew, as notebooks do, is the same.
        if shared and _path(other) != _path(thing):
            raise ValueError(
                f"{_path(thing)} and {_path(other)} are both called {min(shared)}, so that their "
                f"runs could not be told apart: give a copy a key of its own and no former names"
            )


def later(thing: Any) -> dict[str, Any]:
    """Return the options of a class that are newer than some runs, each with its default."""
    listed = getattr(thing, "later", None)
    found = {}
    if isinstance(listed, Mapping):
        found = {name: plain(value) for name, value in listed.items()}
    for each in fields(thing) if is_dataclass(thing) else ():
        if each.metadata.get("later"):
            made = each.default if each.default_factory is MISSING else each.default_factory()
            found[each.name] = plain(made)
    return found


def without_later(values: Mapping[str, Any], thing: Any) -> dict[str, Any]:
    """Return the options of a class without the newer ones that have their default."""
    came_later = later(thing)
    return {
        name: value
        for name, value in values.items()
        if name not in came_later or plain(value) != came_later[name]
    }


def settings(thing: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values, without newer ones at their default."""
    values = {each.name: plain(getattr(thing, each.name)) for each in fields(thing)}
    return without_later(values, type(thing))


def weights(module: nn.Module) -> dict[str, str]:
    """Return a module as its class and the sha256 of its weights by name."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return {"module": name_of(type(module)), "weights_sha256": sha.hexdigest()}


def plain(value: Any) -> Any:
    """Return a value as JSON would read it back, except that a :class:`Name` stays one."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    # Where torch is not imported, nothing is a module of it.
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].nn.Module):
        return weights(value)
    if isinstance(value, partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return name_of(value)
    return repr(value)


def written(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as files hold it, where classes stand by their keys."""
    values: dict[str, Any] = json.loads(json.dumps(identity))
    return values


def hashed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as it is hashed, where classes stand by the first names they had."""
    return written(_first_names(identity))


def digest(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of an identity, in hexadecimal digits."""
    text = json.dumps(hashed(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def agree(before: Any, now: Any) -> bool:
    """Return whether a value from a file means the same as a value of an identity now."""
    if isinstance(now, Name):
        return before == now or before in now.former
    if isinstance(now, Mapping):
        same = isinstance(before, Mapping) and before.keys() == now.keys()
        return same and all(agree(before[key], value) for key, value in now.items())
    if isinstance(now, (list, tuple)):
        same = isinstance(before, (list, tuple)) and len(before) == len(now)
        return same and all(map(agree, before, now))
    return bool(before == now)


def _first_names(value: Any) -> Any:
    if isinstance(value, Name):
        return value.former[0] if value.former else str(value)
    if isinstance(value, Mapping):
        return {key: _first_names(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_first_names(each) for each in value]
    return value
