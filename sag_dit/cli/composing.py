"""Hydra's side of the door: arguments to configurations, and their ``_target_`` to objects.

What is behind the door sees neither Hydra nor OmegaConf: :func:`compose` returns an instance of the
command's schema, and :func:`make` takes plain values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules, resolve_name
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sag_dit.bounds import Bounds, fit, is_function, parts, shown, wanted
from sag_dit.cli.first_rank import tell_once
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import Closed, substituted, walk
from sag_dit.cli.schema import check, free_text
from sag_dit.cli.signatures import names_along, names_taken
from sag_dit.messages import nearest
from sag_dit.methods import guidance_defaults, scales
from sag_dit.output.telling import hydra_quoted
from sag_dit.raised import failure, unknown_argument

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

UNDECLARED = Bounds(lenient=True)
"""Of an argument of which its annotation is all that is known."""

C = TypeVar("C", bound=Closed)


@cache
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
    return f"{key}={_named(value) if listed else hydra_quoted(value)}"


def _named(value: str) -> str:
    """Quote a name, or every name of a list; what Hydra reads as something else stays."""
    if not (value.startswith("[") and value.endswith("]")):
        filled = re.sub(r"\$\{[^{}]*\}", "", value)
        plain = NO_NAME.fullmatch(value) or re.search(r"[\[\]{},\\]", filled)
        return value if plain or QUOTATION.fullmatch(value) else hydra_quoted(value)
    found = [match[0].strip() for match in NAME.finditer(value[1:-1]) if match[0].strip()]
    return f"[{','.join(map(_named, found))}]"


def _literal(value: Any) -> Any:
    """Escape what OmegaConf would take for an interpolation, so that texts mean themselves."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    if isinstance(value, Mapping):
        return {name: _literal(each) for name, each in value.items()}
    return [_literal(each) for each in value] if isinstance(value, list) else value


def own_targets(arguments: Sequence[str]) -> set[str]:
    """Return the mappings whose ``_target_`` the arguments name, by their paths."""
    keys = (each.partition("=")[0].lstrip("+") for each in arguments if each[:1] != "~")
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

    What the user states stays, and is refused later. Of a constructor with ``**options`` that is
    what it and its bases do not name.
    """
    stated = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    for path in own_targets(arguments):
        node = OmegaConf.select(config, path)
        target = str(node["_target_"])
        takes = taken_by(target, path)
        named = named_by(target) if takes is None else frozenset()
        if named:
            around = _arounds().get(path)
            takes = {*named, *(_around_takes(around) if around else ())}
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
    return checked_config(command, _composed(command, arguments), as_typed(arguments))


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
    found: C = checked_config(command, composed)
    return found


def checked_config(command: str, config: DictConfig, typed: Mapping[str, str] | None = None) -> Any:
    """Return what Hydra has composed as an instance of the command's schema.

    ``typed`` holds what the user stated, by the keys, as it was written.

    Raises:
        ValueError: a key that there is not, a value of another type or out of bounds, or one that
            is missing.
    """
    typed = typed or {}
    config = _texts_as_typed(command, config, typed)
    # Other keys may name the folder, which may only be known later.
    named, out = config.copy(), config.get("out")
    if "out" in config and (out is None or isinstance(out, str)):
        named.out = FOLDER if out is None else _literal(str(Path(out)))
    # What is wrong in a line of its own is told before what is missing.
    missing = OmegaConf.missing_keys(named)
    for key in missing:
        OmegaConf.update(named, key, None)
    values: Any = OmegaConf.to_container(named, resolve=True)
    found = check(command, {**values, "out": out} if "out" in config else values, typed, missing)
    if missing:
        raise ValueError(found.unset(sorted(missing)))
    return replace(found, source=config, typed=dict(typed))


def as_typed(arguments: Iterable[str]) -> dict[str, str]:
    """Return what arguments state, by their keys, as it was written.

    Example:
        >>> as_typed(["steps=20", "+data.how=nan"])
        {'steps': '20', 'data.how': 'nan'}
    """
    return dict(each.lstrip("+").partition("=")[::2] for each in arguments)


def _texts_as_typed(command: str, config: DictConfig, typed: Mapping[str, str]) -> DictConfig:
    """Return a configuration whose texts are as they were typed, though Hydra read numbers.

    Texts are arguments of a class or function of another package whose annotation says ``str`` and
    not what Hydra read.
    """
    declared = {path for path, *_ in walk(COMMANDS[command])}
    found = config.copy()
    for path in typed.keys() - declared:
        group, _, name = path.rpartition(".")
        node = OmegaConf.select(config, group) if group and "${" not in path else None
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        if not isinstance(target, str) or target.startswith("sag_dit."):
            continue
        values: Any = OmegaConf.to_container(node)
        read, takes = values.get(name, ""), names_taken(target)
        if isinstance(read, (bool, int, float, type(None))) and (takes is None or name in takes):
            hint = (hints_of(target) or {}).get(name, Any)
            if str in parts(hint) and not fit(read, hint, UNDECLARED)[0]:
                OmegaConf.update(found, path, _literal(typed[path].strip()))
    return found


def placed(config: C, folder: Path) -> C:
    """Return a configuration whose folder is known, also where other keys name it."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    opened = {name: value for name, value in found.items() if isinstance(value, dict)}
    changed = {name: substituted(value, FOLDER, str(folder)) for name, value in opened.items()}
    return replace(config, out=str(folder), **changed)  # type: ignore[call-arg]


def make(values: Mapping[str, Any], where: str, kind: type = object, **more: Any) -> Any:
    """Build the object that ``_target_`` names from the other values, lists and mappings plain.

    ``where`` is the key at which they stand, for the message. ``kind`` is what it has to be.
    ``more`` are arguments beside them; of one that is a list, the values' own come first.

    Raises:
        ValueError: there is no such thing, it takes no such argument, it refuses a value, or it
            makes something of another kind.

    Example:
        >>> make({"_target_": "sag_dit.guidance.CFG", "scale": 2.0}, "guidance.cfg").scale
        2.0
    """
    # What stands within is made first.
    thing, given = check_target(values, where)
    made = {name: _made(value, f"{where}.{name}") for name, value in given.items()}
    check_functions(made, given, where, str(values["_target_"]))
    for name in made.keys() & more.keys():
        if not (isinstance(made[name], list) and isinstance(more[name], list)):
            raise ValueError(
                f"{where}.{name}={shown(values[name])}: the command sets {name} itself; leave it "
                f"out"
            )
        more[name] = made[name] + more[name]
    # What is partial is called later, with the arguments that are left.
    build = partial(thing, *_made(values.get("_args_", []), where), **{**made, **more})
    try:
        found: Any = build if values.get("_partial_") else build()
    except Exception as error:
        raise ValueError(_not_made(error, where, str(values["_target_"]), given)) from error
    returned = thing if found is build else type(found)
    if isinstance(returned, type) and not issubclass(returned, kind):
        raise ValueError(
            f"{where}: {values['_target_']} makes a {returned.__name__}; expected a subclass of "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return found


def check_functions(
    made: Mapping[str, Any], given: Mapping[str, Any], where: str, target: str
) -> None:
    """Refuse what was called, or cannot be called, where a target takes a function.

    Raises:
        ValueError: the argument, and how to state a function.
    """
    hints = hints_of(target) or {}
    for name, value in given.items():
        kinds = [each for each in parts(hints.get(name, Any)) if each is not type(None)]
        takes = all(map(is_function, kinds)) and isinstance(value, Mapping)
        if not takes or callable(made[name]):
            continue
        function = value.get("_target_")
        called = f": this calls it, and passes on the {type(made[name]).__name__} that it returns"
        stated = f"{{_target_: {function or 'my_module.its_name'}, _partial_: true}}"
        raise ValueError(
            f"{where}.{name}={shown(value)}: {target} takes a function here"
            f"{called if function else ''}; expected {stated}"
        )


def _not_made(error: Exception, where: str, target: str, given: Collection[str]) -> str:
    """Return what to tell of an error of a class or function that was called.

    Of errors whose text tells little by itself, the class that was called and the kind are told.
    """
    told = str(error)
    named = re.match(r"(\w+)=", told)
    if named is not None and named[1] in given:
        return f"{where}.{told}"
    unknown = unknown_argument(error)
    if unknown is not None:
        return f"{where}: {told}{nearest(unknown, named_by(target))}"
    mute = (LookupError, AttributeError, AssertionError, NameError, ArithmeticError)
    silent = not told or isinstance(error, mute)
    return f"{where}: {target} fails with {failure(error)}" if silent else f"{where}: {told}"


def _made(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_made(each, f"{path}[{place}]") for place, each in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "_target_" in value:
        return make(value, path)
    return {name: _made(each, f"{path}.{name}") for name, each in value.items()}


def import_own(modules: str | Sequence[str]) -> None:
    """Import the user's modules, so that what checkpoints name of them is found.

    Raises:
        ValueError: there is no such module, or it cannot be imported.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"imports={name}: {_no_module(name, error)}") from error
        except Exception as error:  # Whatever a module of the user's does while it is imported.
            raise ValueError(f"imports={name}: {error}") from error


def _no_module(wanted: str, error: ModuleNotFoundError) -> str:
    """Return what to tell where a module is missing: the wanted one, or one that it imports."""
    missing = str(error.name)
    return (
        f"there is no module {missing}; start Python where its file lies, or put that folder on "
        f"PYTHONPATH{_close(missing) if f'{wanted}.'.startswith(f'{missing}.') else ''}"
    )


def _close(name: str) -> str:
    """Return a sentence that names what is close to a module, class or function that there is not.

    Its first part that is unknown is compared with what stands beside it: modules, or at the end
    classes and functions.
    """
    known: Any = None
    *_, last = names = name.split(".")
    for part in names:
        try:
            known = import_module(part) if known is None else _within(known, part)
        except Exception:  # Whatever a module of the user's does while it is imported.
            folders = None if known is None else getattr(known, "__path__", ())
            if part is not last or known is None:
                beside = {each.name for each in iter_modules(folders)}
                # A module that is there and fails is not misspelt.
                return "" if part in beside else nearest(part, beside)
            public = [each for each in dir(known) if not each.startswith("_")]
            return nearest(part, [each for each in public if callable(getattr(known, each, None))])
    return ""


def _within(known: Any, part: str) -> Any:
    if hasattr(known, part) or not hasattr(known, "__path__"):
        return getattr(known, part)
    return import_module(f"{known.__name__}.{part}")


def check_target(values: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return what ``_target_`` names, and its arguments among the values.

    Raises:
        ValueError: there is no such thing, or it takes no such argument, or none of that type.
    """
    target = values.get("_target_")
    if not isinstance(target, str) or not target:
        stated = f"._target_={shown(target)}" if "_target_" in values else ""
        raise ValueError(f"{where}{stated}: expected the name of a class as _target_")
    try:
        thing = resolve_name(target)
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}._target_={target}: {_no_module(target, error)}") from error
    except Exception as error:  # Whatever a module of the user's does while it is imported.
        raise ValueError(f"{where}._target_={target}: {error}{_close(target)}") from error
    return thing, fitted(values, where, [target])


def fitted(values: Mapping[str, Any], where: str, targets: Sequence[str]) -> dict[str, Any]:
    """Return the arguments in values as the annotations of a target, or of one of several, say.

    Raises:
        ValueError: an argument that none takes, or a value of another type.

    Example:
        >>> fitted({"kernel_size": 9.0}, "guidance.sag", ["sag_dit.guidance.SAG"])
        {'kernel_size': 9}
    """
    refuse_strangers(where, targets, values)
    takes: dict[str, Any] = {}
    for target in targets:
        takes |= hints_of(target) or {}
    used = {name: value for name, value in values.items() if not name.startswith("_")}
    for name, value in used.items():
        hint = takes.get(name, Any)
        if isinstance(value, Mapping):
            continue
        fits, plain = fit(value, hint, UNDECLARED)
        used[name] = list(plain) if isinstance(plain, tuple) else plain
        if not fits:
            raise ValueError(f"{where}.{name}={shown(value)}: expected {wanted(hint, UNDECLARED)}")
    return used


def hints_of(target: str) -> dict[str, Any] | None:
    """Return what a class or function names of its arguments, with the types.

    None if there is none such, which is told when it is made.
    """
    try:
        thing = resolve_name(target)
        parameters = inspect.signature(thing).parameters.values()
    except Exception:
        return None
    built = isinstance(thing, type) and not is_dataclass(thing)
    annotated = getattr(thing, "__init__", None) if built else thing
    try:
        hints = get_type_hints(annotated)
    except Exception:  # Names that are there for type checkers alone.
        hints = {}
    # Older code says int where it means int or None.
    found = {each.name: hints.get(each.name, Any) for each in parameters}
    return {
        each.name: found[each.name] | None if each.default is None else found[each.name]
        for each in parameters
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }


def arguments_of(target: str) -> dict[str, Any] | None:
    """Return what a class or function takes by name, with the types; None if it takes anything.

    None as well if there is none such, which is told when it is made.
    """
    found = hints_of(target)
    if found is None:
        return None
    parameters = inspect.signature(resolve_name(target)).parameters.values()
    return None if any(each.kind is each.VAR_KEYWORD for each in parameters) else found


def taken_by(target: str, path: str = "") -> Collection[str] | None:
    """Return what a class or function takes by name; None as :func:`arguments_of`.

    At a key whose values may be put around what the target makes, also what those are.
    """
    # An import takes seconds, a file that tells the same does not.
    takes = names_taken(target) or arguments_of(target)
    around = _arounds().get(path)
    if takes is None or around is None or target.startswith("sag_dit."):
        return takes
    return {*takes, *(() if is_of_kind(target, around) else _around_takes(around))}


def named_by(target: str) -> frozenset[str]:
    """Return what a class with ``**options`` and its bases name; nothing if it cannot be told."""
    try:
        thing = resolve_name(target)
        return names_along(thing) if isinstance(thing, type) else frozenset()
    except Exception:  # What is wrong with it is told when it is made.
        return frozenset()


def _around_takes(around: str) -> set[str]:
    """Return the arguments of what is put around a thing, without the thing."""
    return {*(arguments_of(f"{around}.of") or {})} - {"thing"}


@cache
def _arounds() -> Mapping[str, str]:
    """Return what is put around things of another kind than expected, by the keys."""
    found = (each for schema in COMMANDS.values() for each in walk(schema))
    return {path: told.around for path, _, told in found if told.around}


def is_of_kind(target: str, around: str) -> bool:
    """Whether a target makes what is expected where ``around`` is put around all else.

    What is expected is ``around.kind``; a function tells by its annotation what it returns.
    """
    kind = resolve_name(around).kind
    try:
        thing = resolve_name(target)
        made = thing if isinstance(thing, type) else get_type_hints(thing).get("return")
    except Exception:  # It is told when it is made.
        return False
    return isinstance(made, type) and issubclass(made, kind)


def make_around(values: Mapping[str, Any], where: str, around: str) -> Any:
    """Build what ``_target_`` names, and put ``around`` around it if it is of another kind.

    The target is given what it takes, ``around.of`` the arguments that it takes itself.

    Raises:
        ValueError: as :func:`make`.
    """
    target, kind = str(values.get("_target_") or ""), resolve_name(around).kind
    if not target or is_of_kind(target, around):
        return make(values, where, kind)
    # What the target takes, and what is left for the thing around it.
    outer = _around_takes(around)
    own = names_taken(target) or arguments_of(target)
    mine = {
        name: value
        for name, value in values.items()
        if name[0] == "_" or name not in outer or (own is not None and name in own)
    }
    found = make(mine, where)
    rest = {name: value for name, value in values.items() if name in outer}
    if isinstance(found, kind):
        unused = [name for name in rest if name not in mine]
        if unused:
            raise ValueError(
                f"{where}.{unused[0]}: {target} takes no {unused[0]}; let its annotation say that "
                f"it returns a {kind.__name__}"
            )
        return found
    return make({"_target_": f"{around}.of", **rest}, where, kind, thing=found)


def refuse_strangers(path: str, targets: Sequence[str], names: Iterable[str]) -> None:
    """Refuse keys of an open mapping that none of its targets takes.

    Of one that takes anything, a name that is close to one that it names is told.

    Raises:
        ValueError: the key, and those that are close.
    """
    takes: set[str] = set()
    own = [name for name in names if not name.startswith("_")]
    for target in targets:
        taken = taken_by(target, path)
        if taken is None:
            named = {*named_by(target), *(hints_of(target) or ())}
            for name in own:
                close = "" if name in named else nearest(name, named).strip()
                if close:
                    told = f"{path}.{name}: {target} takes any name by its **, and names no {name}"
                    tell_once(f"{told}. {close}")
            return
        takes |= set(taken)
    for name in own:
        if targets and name not in takes:
            told = f"{' and '.join(targets)} take{'s' * (len(targets) == 1)}"
            raise ValueError(f"{path}.{name}: {told} no {name}{nearest(name, takes)}")
