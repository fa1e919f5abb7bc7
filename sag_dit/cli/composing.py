"""Hydra's side of the door: arguments to configurations, and their ``_target_`` to objects.

What is behind the door sees neither Hydra nor OmegaConf: :func:`compose` returns an instance of the
command's schema, and :func:`make` takes plain values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sag_dit.cli.keys.key import Closed, substituted
from sag_dit.cli.schema import check, free_text, nearest
from sag_dit.methods import guidance_defaults, scales

QUOTATION = re.compile(r"""(['"])(\\.|(?!\1|\\).)*\1""", re.DOTALL)
"""A value that the user has quoted for Hydra."""

NAME = re.compile(r"""\s*((['"])(\\.|(?!\2|\\).)*\2\s*(?=,|$)|[^,]*)""", re.DOTALL)
"""A name in a list; one in quotes may hold commas and brackets."""

NO_NAME = re.compile(
    r"[+-]?[\d.][\d._]*(e[+-]?\d+)?|[+-]?(nan|inf)|null|true|false|(str|int|float|bool)\(.*\)",
    re.IGNORECASE | re.DOTALL,
)
"""What Hydra reads as something else than a word."""

FOLDER = "<the folder of this run>"
"""Stands where a configuration names ``${out}`` before the folder is known."""

C = TypeVar("C", bound=Closed)


def config_folder() -> Path:
    """Return the folder of configurations: inside an installed wheel, else beside the package.

    Hydra is told what stands in no file, since it follows from the guidance methods.
    """
    store = ConfigStore.instance()
    store.store(name="scales", node=scales())
    store.store(group="guidance", name="methods", node=guidance_defaults())
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def quoted(argument: str) -> str:
    """Quote the value of a free-text ``key=value`` for Hydra; other arguments stay as they are.

    A value that the user has quoted already, null and a mapping with ``_target_`` are left alone.
    Of names, which may be numbers as well and stand in lists, also those with commas or brackets.
    """
    key, separator, value = argument.partition("=")
    told = free_text().get(key.lstrip("+"))
    if told is None or not separator or value in ("", "null") or QUOTATION.fullmatch(value):
        return argument
    if value.startswith("{") and "_target_" in value:
        return argument
    if told.names:
        return f"{key}={_named(value)}"
    # Several paths; each may hold what a name may.
    listed = told.listed and value.startswith("[")
    return f"{key}={_named(value) if listed else _quoted(value)}"


def _named(value: str) -> str:
    """Quote a name, or every name of a list; what Hydra reads as something else stays."""
    if not (value.startswith("[") and value.endswith("]")):
        plain = NO_NAME.fullmatch(value) or re.search(r"[\[\]{},\\]|\$\{", value)
        return value if plain or QUOTATION.fullmatch(value) else _quoted(value)
    found = [match[0].strip() for match in NAME.finditer(value[1:-1]) if match[0].strip()]
    return f"[{','.join(map(_named, found))}]"


def _quoted(value: str) -> str:
    # Within Hydra's quotes a backslash means itself unless quotes follow it.
    value = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", _literal(value))
    value = re.sub(r"(\\+)$", lambda m: m[1] * 2, value)
    return f"'{value}'"


def _literal(value: Any) -> Any:
    """Escape what OmegaConf would take for an interpolation, so that texts mean themselves."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    if isinstance(value, Mapping):
        return {name: _literal(each) for name, each in value.items()}
    return [_literal(each) for each in value] if isinstance(value, list) else value


def own_targets(arguments: Sequence[str]) -> set[str]:
    """Return the mappings whose ``_target_`` the arguments name, by their paths."""
    keys = (argument.partition("=")[0].lstrip("+") for argument in arguments)
    return {key.removesuffix("._target_") for key in keys if key.endswith("._target_")}


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return arguments as Hydra takes them: free text in quotes, a target's own keys added.

    Hydra refuses keys that stand in no file, which those of the user's own class never do.
    """
    own = own_targets(arguments)
    made = []
    for argument in map(quoted, arguments):
        mine = argument.partition("=")[0].rpartition(".")[0] in own
        made.append(f"++{argument}" if mine and argument[0] not in "+~" else argument)
    return made


def drop_strangers(config: DictConfig, arguments: Sequence[str]) -> None:
    """Drop what files say of a mapping whose class the user has replaced, where it takes no such.

    What the user states stays, and is refused later.
    """
    stated = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    for path in own_targets(arguments):
        node = OmegaConf.select(config, path)
        takes = arguments_of(str(node["_target_"]))
        kept = {*stated, *(f"{path}.{name}" for name in takes or node)}
        with open_dict(node):
            for name in map(str, list(node)):
                if f"{path}.{name}" not in kept and not name.startswith("_"):
                    del node[name]


def _composed(command: str, arguments: Sequence[str]) -> DictConfig:
    # Within a command Hydra has begun, with the folders that the user named.
    begun, folder = GlobalHydra.instance().is_initialized(), str(config_folder())
    with nullcontext() if begun else hydra.initialize_config_dir(folder, version_base="1.3"):
        config = hydra.compose(command, for_hydra(arguments))
    drop_strangers(config, arguments)
    return config


def unresolved(command: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Return what Hydra composes, as it stands in the files: nothing resolved, nothing checked."""
    values: Any = OmegaConf.to_container(_composed(command, arguments))
    return {str(name): value for name, value in values.items()}


def compose(command: str, arguments: Sequence[str] = ()) -> Any:
    """Return what the arguments of a command mean, checked, as an instance of its schema.

    Raises:
        ValueError: a key that there is not, or a value of another type or out of bounds.

    Example:
        >>> compose("sample", ["sag_scale=0.5"]).guidance["sag"]["scale"]
        0.5
    """
    return checked(command, _composed(command, arguments))


def changed(command: str, config: C, changes: Mapping[str, Any]) -> C:
    """Return a configuration with other values, by the paths of their keys, checked anew.

    Keys that name one of them by ``${...}`` follow.

    Raises:
        ValueError: a key that there is not, or a value of another type or out of bounds.

    Example:
        >>> louder = changed("sample", compose("sample"), {"sag_scale": 2.0})
        >>> louder.guidance["sag"]["scale"]
        2.0
    """
    composed = config.source.copy()
    for key, value in changes.items():
        try:
            OmegaConf.update(composed, key, _literal(value), force_add=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"{key}: {error}") from error
    drop_strangers(composed, [*changes])
    found: C = checked(command, composed)
    return found


def checked(command: str, config: DictConfig, typed: Mapping[str, str] | None = None) -> Any:
    """Return what Hydra has composed as an instance of the command's schema.

    ``typed`` holds values as the user wrote them, for the message.

    Raises:
        ValueError: a key that there is not, a value of another type or out of bounds, or one that
            is missing.
    """
    # Other keys may name the folder, which may only be known later.
    named, out = config.copy(), config.get("out")
    if out is None or isinstance(out, str):
        named.out = FOLDER if out is None else _literal(str(Path(out)))
    # What is wrong in a line of its own is told before what is missing.
    missing = OmegaConf.missing_keys(named)
    for key in missing:
        OmegaConf.update(named, key, None)
    values: Any = OmegaConf.to_container(named, resolve=True)
    found = check(command, {**values, "out": out}, typed, missing)
    if missing:
        raise ValueError(found.unset(sorted(missing)))
    return replace(found, source=config)


def placed(config: C, folder: Path) -> C:
    """Return a configuration whose folder is known, also where other keys name it."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    opened = {name: value for name, value in found.items() if isinstance(value, dict)}
    changed = {name: substituted(value, FOLDER, str(folder)) for name, value in opened.items()}
    return replace(config, out=str(folder), **changed)  # type: ignore[call-arg]


def make(values: Mapping[str, Any], where: str, kind: type = object, **more: Any) -> Any:
    """Build the object that ``_target_`` names from the other values, lists and mappings plain.

    ``where`` is the key at which they stand, for the message. ``kind`` is what it has to be.
    ``more`` are arguments beside them.

    Raises:
        ValueError: there is no such thing, it takes no such argument, it refuses a value, or it
            makes something of another kind.

    Example:
        >>> make({"_target_": "sag_dit.guidance.CFG", "scale": 2.0}, "guidance.cfg").scale
        2.0
    """
    for path, node in _targets(values, where):
        refuse_strangers(path, [str(node["_target_"])], set(map(str, node)))
    try:
        made = hydra.utils.instantiate(_literal(values), **_literal(more), _convert_="all")
    except InstantiationException as error:
        inside = re.search(r"\nfull_key: (.+)$", str(error))
        path = f"{where}.{inside[1]}" if inside else where
        cause = error.__cause__
        if missing := re.search(r"No module named '([^']+)'", f"{error} {cause}"):
            raise ValueError(
                f"{path}._target_={values.get('_target_')}: there is no module {missing[1]}; start "
                f"Python where its file lies, or put that folder on PYTHONPATH"
            ) from error
        if isinstance(cause, TypeError):
            raise ValueError(f"{path}: {values.get('_target_')}: {cause}") from error
        if cause is not None:
            raise ValueError(f"{path}: {cause}") from error
        told = str(error).partition("\n")[0].partition(", set env var HYDRA")[0]
        raise ValueError(f"{path}: {told}") from error
    if not isinstance(made, kind):
        raise ValueError(
            f"{where}: {values['_target_']} makes a {type(made).__name__}; expected a subclass of "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return made


def _targets(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a ``_target_`` by its path."""
    if isinstance(value, list):
        for place, each in enumerate(value):
            yield from _targets(each, f"{path}[{place}]")
    if not isinstance(value, Mapping):
        return
    if "_target_" in value:
        yield path, value
    for name, each in value.items():
        yield from _targets(each, f"{path}.{name}")


def arguments_of(target: str) -> set[str] | None:
    """Return what a class or function takes by name; None if anything, or if there is none such."""
    try:
        parameters = inspect.signature(resolve_name(target)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return None  # It is told when it is made.
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters}


def refuse_strangers(path: str, targets: Sequence[str], names: Iterable[str]) -> None:
    """Refuse keys of an open mapping that none of its targets takes.

    Raises:
        ValueError: the key, and those that are close.
    """
    takes: set[str] = set()
    for target in targets:
        own = arguments_of(target)
        if own is None:
            return
        takes |= own
    for name in names:
        if targets and name not in takes and not name.startswith("_"):
            told = f"{' and '.join(targets)} take{'s' * (len(targets) == 1)}"
            raise ValueError(f"{path}.{name}: {told} no {name}{nearest(name, takes)}")
