"""The command line before Hydra reads it: flags in order, habits of other programs, choices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, get_origin

import yaml
from hydra._internal.utils import get_args_parser

from sag_dit.bounds import parts
from sag_dit.cli.composing import config_folder, own_targets, refuse_strangers
from sag_dit.cli.first_rank import tell_once
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import (
    Key,
    held_by,
    is_open,
    keys_of,
    mapping_of,
    selected,
    to_dict,
    walk,
)
from sag_dit.cli.schema import expected

HELP = ("-h", "--help")
MULTIRUN = ("-m", "--multirun")
OTHER_CONFIGS = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name")


@cache
def _values_after_flags() -> Mapping[str, int | str | None]:
    """Flag of Hydra -> how many values follow, in argparse's words: 0, "?" or None for one."""
    actions = get_args_parser()._actions
    return {flag: action.nargs for action in actions for flag in action.option_strings}


def keys_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the keys and the flags of a command line, each flag followed by its value.

    Hydra itself takes keys only before its flags, or only after them.

    Raises:
        ValueError: a flag that Hydra has not.
    """
    keys: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or re.match(r"-[\d.]", argument):
            keys.append(argument)
            continue
        name, separator, value = argument.partition("=")
        if name not in _values_after_flags():
            raise _not_a_flag(name, value or next(iter(rest), ""))
        flags.append(argument)
        # A value that may be left out, as of --info, is a word, never KEY=VALUE.
        values = _values_after_flags()[name]
        follows = values is None or (values == "?" and "=" not in "".join(rest[:1]))
        if follows and not separator and rest:
            flags.append(rest.pop(0))
    return keys, flags


def _not_a_flag(flag: str, value: str) -> ValueError:
    name = flag.lstrip("-").replace("-", "_")
    value = "..." if not value or value.startswith("-") or "=" in value else value
    return ValueError(f"{flag}: keys are written without dashes, {name}={value}; see --help")


def check_arguments(command: str, arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra; refuse what it would misread.

    Raises:
        ValueError: a key or a choice that there is not, or a habit of another program.
    """
    others = any(flag.partition("=")[0] in OTHER_CONFIGS for flag in flags)
    kept = []
    arguments = _last_of_each([one for each in arguments for one in _spread(command, each)])
    for place, argument in enumerate(arguments):
        name, separator, value = argument.lstrip("+").partition("=")
        if argument.startswith("~"):
            if known(command, name[1:]) is None and name[1:] not in groups(command):
                raise ValueError(f"{argument}: no such key{did_you_mean(command, name[1:])}")
            kept.append(argument)
            continue
        if not separator or not name:
            _refuse_spaces(arguments, place)
        found = known(command, name)
        if is_group(name) and name not in groups(command) and found is not None:
            # Hydra would take it for a choice of another command's group.
            raise ValueError(f"{argument}: expected {expected(*found, name)}")
        if is_group(name):
            chosen = argument if others else _choice(command, argument, name, value)
            kept += [chosen] if chosen else []
            continue
        if found is None and not others:
            raise ValueError(f"{argument}: no such key{did_you_mean(command, name)}")
        if found is not None and _is_number(found[0]) and re.fullmatch(r"-?\d+,\d+", value):
            point = value.replace(",", ".")
            raise ValueError(
                f"{argument}: expected one number; write {name}={point} with a point, or try "
                f"several with -m"
            )
        # Hydra takes what stands in no file with a plus alone.
        added = found is not None and (found[1].added or _takes_any(command, name))
        kept.append(f"++{argument}" if added and not argument.startswith("+") else argument)
    return kept


def _spread(command: str, argument: str) -> list[str]:
    """Return a mapping that is stated for a group of keys as its keys, which are then checked.

    Hydra would add them to the group as well.
    """
    key, _, value = argument.partition("=")
    found = known(command, key.removeprefix("++"))
    members = _pairs_in(value) if found is not None and found is not ANYTHING else None
    hint = found[0] if found is not None else None
    alone = all(
        kind is type(None) or is_dataclass(kind) or get_origin(kind) is dict for kind in parts(hint)
    )
    if not members or not alone:
        return [argument]
    spread = (_spread(command, f"{key}.{name}={text}") for name, text in members)
    return [one for each in spread for one in each]


def _pairs_in(text: str) -> list[tuple[str, str]] | None:
    """Return the names and values of a mapping as they are written; None of what is none."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    pieces, depth, quote = [""], 0, ""
    for sign, before in zip(text[1:-1], text[:-2], strict=True):
        if quote:
            quote = "" if sign == quote and before != "\\" else quote
        elif sign in "\"'":
            quote = sign
        depth += 0 if quote else (sign in "{[(") - (sign in "}])")
        if sign == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += sign
    found = [re.fullmatch(r"\s*([\w.]+)\s*:\s*(.+?)\s*", each, re.DOTALL) for each in pieces]
    whole = [(each[1], each[2]) for each in found if each is not None]
    return whole if len(whole) == len(pieces) and not depth and not quote else None


def _last_of_each(arguments: Sequence[str]) -> list[str]:
    """Return arguments of which the last one counts for each key; what it overrides is told.

    Scripts append what they are given to what they state themselves. Mappings add to each other.
    """
    last: dict[str, str] = {}
    kept: list[str] = []
    for argument in reversed(arguments):
        key, separator, value = argument.lstrip("+").partition("=")
        later = last.get(key) if separator and not value.startswith("{") else None
        if later is None:
            kept.insert(0, argument)
        elif later != argument:
            tell_once(f"{later} overrides {argument}, which stands before it")
        if separator and not value.startswith("{"):
            last.setdefault(key, argument)
    return kept


def _takes_any(command: str, path: str) -> bool:
    """Whether a key stands right in a mapping of arguments, of which its target takes any."""
    found = known(command, path.rpartition(".")[0]) if "." in path else None
    return found is not None and held_by(found[0]) is Any


def _refuse_spaces(arguments: Sequence[str], place: int) -> None:
    before = arguments[place - 1] if place else ""
    own, *after = arguments[place : place + 3]
    pieces = []
    if before.endswith("="):
        pieces = [before, own]
    elif after and after[0].startswith("=") and not own.startswith("="):
        pieces = [own, *after[: 2 if after[0] == "=" else 1]]
    if pieces:
        raise ValueError(f"{' '.join(pieces)}: write {''.join(pieces)} without spaces")
    raise ValueError(f"{own}: expected KEY=VALUE, such as steps=20; see --help")


def _is_number(hint: Any) -> bool:
    return all(kind in (int, float, type(None)) for kind in parts(hint))


def is_group(name: str) -> bool:
    """Whether there is a group of configurations of this name."""
    return re.fullmatch(r"\w+(/\w+)*", name) is not None and (config_folder() / name).is_dir()


def choices(group: str) -> list[str]:
    """Return the choices of a group."""
    folder = config_folder() / group
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def groups(command: str) -> list[str]:
    """Return the groups of configurations that a command takes."""
    return [*default_choices(command)]


def default_choices(command: str) -> dict[str, str | None]:
    """Return what is chosen of each group of a command unless it is said."""
    stated = yaml.safe_load((config_folder() / f"{command}.yaml").read_text())["defaults"]
    chosen = (item for each in stated if isinstance(each, dict) for item in each.items())
    return {name: choice for name, choice in chosen if "override" not in name}


def experiments(command: str) -> list[str]:
    """Return the experiments of a command: those that state nothing that it has not."""
    schema: Any = COMMANDS[command]
    own = {*groups(command), *keys_of(schema)}
    return [name for name in choices("experiment") if _stated(name) <= own]


def only_with(command: str, key: str) -> list[str]:
    """Return the experiments without which a command has not a key; none where it has it anyway."""
    schema: Any = COMMANDS[command]
    name = key.partition(".")[0]
    declared = keys_of(schema).get(name)
    if declared is None or not declared[1].absent or declared[1].added:
        return []
    return [each for each in experiments(command) if name in _stated(each)]


def _stated(experiment: str) -> set[str]:
    """Return the groups and keys that an experiment states, with those of what it builds on."""
    values = yaml.safe_load((config_folder() / "experiment" / f"{experiment}.yaml").read_text())
    found = set(values) - {"defaults"}
    for each in values.get("defaults", []):
        if isinstance(each, dict):
            found |= {name.removeprefix("override ").strip("/") for name in each}
        elif each != "_self_":
            found |= _stated(str(PurePosixPath(experiment).parent / each))
    return found


def _choice(command: str, argument: str, group: str, value: str) -> str | None:
    """Return the argument for Hydra, None to leave it out: ``GROUP=null`` is the empty choice.

    Raises:
        ValueError: the command has no such group, or the group no such choice.
    """
    if group not in groups(command):
        *others, last = [f"{name}.py" for name in COMMANDS if group in groups(name)]
        takes = f"{', '.join(others)} and {last} take" if others else f"{last} takes"
        own = ", ".join(groups(command)) or "no groups"
        raise ValueError(f"{argument}: {takes} {group}=...; {command}.py takes {own}")
    found = experiments(command) if group == "experiment" else choices(group)
    if value == "null":
        if group == "experiment":
            return None
        empty = [each for each in found if is_empty(group, each)]
        if empty:
            return f"{group}={empty[0]}"
    name = value.strip("'\"")
    if name in found or value.startswith("{"):
        return argument
    others = [each for each in choices(group) if each == name]
    told = f"{argument}: that experiment is for another command; " if others else f"{argument}: "
    close = difflib.get_close_matches(name.lower(), found, n=3, cutoff=0.4)
    if value == "null":
        close = []
    raise ValueError(
        f"{told}expected one of {', '.join(found)}"
        + (f"\nDid you mean {' or '.join(close)}?" if close else "")
    )


def is_empty(group: str, choice: str) -> bool:
    """Whether a choice of a group holds nothing."""
    return not yaml.safe_load((config_folder() / group / f"{choice}.yaml").read_text())


ANYTHING = (Any, Key(""))
"""Stands for a key of which nothing is declared."""


def known(command: str, path: str) -> tuple[Any, Key] | None:
    """Return the type of a key and what is known of it; None for no key.

    In an open mapping any key may stand.
    """
    if path.partition(".")[0] == "hydra" or any(sign in path for sign in "@:/"):
        return ANYTHING
    inside: Any = COMMANDS[command]
    opened = False
    found: tuple[Any, Key] | None = None
    for name in path.split("."):
        found = None if inside is None else keys_of(inside).get(name)
        if found is None:
            return ANYTHING if opened else None
        inside, opened = mapping_of(*found), is_open(found[0])
    return found


def did_you_mean(command: str, path: str) -> str:
    """Return a hint of what an unknown key may mean, nothing where none is close."""
    found = COMMANDS[command]
    habit = getattr(found, "habits", {}).get(path)
    if habit:
        return f"; {habit}"
    paths = [each for each, *_ in walk(found)]
    words = {word: each for each, _, told in walk(found) for word in told.words.split()}
    last = path.rpartition(".")[2]
    same = [each for each in paths if each.rpartition(".")[2] == last]
    beside = [each for each in paths if each.rpartition(".")[0] == path.rpartition(".")[0]]
    near = difflib.get_close_matches(path, beside if "." in path else (), n=1, cutoff=0.9)
    if path in words or (same and not near):
        return f"; did you mean {words[path] if path in words else ' or '.join(same)}?"
    names = {each: each for each in paths} | words
    close = difflib.get_close_matches(path, names, n=3, cutoff=0.6)
    meant = dict.fromkeys(names[each] for each in close)
    return f"\nDid you mean {' or '.join(meant)}?" if meant else ""


def is_null(group: str) -> str:
    """Return that nothing is chosen of a group of configurations, and what can be."""
    full = [f"{group}={each}" for each in choices(group) if not is_empty(group, each)]
    return f"{group} is null: choose {' or '.join(full)} as well"


def check_added(command: str, config: Any, arguments: Sequence[str]) -> None:
    """Refuse keys that ``+`` adds to an open mapping whose target does not take them.

    Raises:
        ValueError: the key, and those that are close.
    """
    values, own = to_dict(config), own_targets(arguments)
    for argument in arguments:
        path = argument.partition("=")[0].lstrip("+")
        parent, _, name = path.rpartition(".")
        added = argument.startswith("+") or parent in own
        node = selected(values, parent) if added and parent else None
        if not isinstance(node, Mapping):
            continue
        found = known(command, parent)
        declared = keys_of(mapping_of(*found)) if found and mapping_of(*found) else {}
        if name in declared and "_target_" not in node:
            continue
        asked = found[1].asks() if found and "_target_" not in node else ()
        arguments_alone = found is not None and held_by(found[0]) is Any and "_target_" not in node
        if arguments_alone and parent in groups(command):
            raise ValueError(f"{argument.lstrip('+')}: {is_null(parent)}")
        targets = [str(node["_target_"])] if "_target_" in node else asked
        try:
            refuse_strangers(parent, targets, [name])
        except ValueError as error:
            raise ValueError(str(error).replace(path, argument.lstrip("+"), 1)) from None
