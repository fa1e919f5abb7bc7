"""``--help``: a command with all its keys, or one of its groups."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from sag_dit.bounds import parts, shown
from sag_dit.cli.composing import config_folder, unresolved
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import Key, is_open, mapping_of, selected, walk
from sag_dit.cli.typed import choices, default_choices, experiments, groups, is_empty, only_with
from sag_dit.methods import OF_ALL, Method, methods

WIDTH = 100
"""Of the lines that list choices."""


def help_text(command: str, topic: str | None = None) -> str:
    """Return what ``--help`` prints: the command, or one of its groups or choices."""
    if topic is not None:
        return _group_help(command, *topic.partition("=")[::2])
    found = COMMANDS[command]
    own = groups(command)
    # The keys, but for those of groups of which nothing is chosen unless asked for.
    config = unresolved(command)
    idle = {group for group in own if not config.get(group)}
    lines = [inspect.cleandoc(found.__doc__ or ""), "", *getattr(found, "examples", ()), ""]
    keys = (row for row in walk(found) if row[0].split(".")[0] not in idle)
    lines += _key_table(command, keys, config)
    if not own:
        return "\n".join(lines)
    lines += ["", "groups (GROUP=CHOICE; --help GROUP or GROUP=CHOICE shows what it holds):"]
    for group in own:
        told = f"{group:12} {', '.join(_choices(command, group))}"
        lines += textwrap.wrap(told, WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)
    return "\n".join(lines)


def _choices(command: str, group: str) -> list[str]:
    return experiments(command) if group == "experiment" else choices(group)


def _key_table(
    command: str,
    keys: Iterable[tuple[str, Any, Key]],
    config: Mapping[str, Any],
    everything: bool = False,
) -> list[str]:
    """Return keys with their types, defaults and meanings, in columns.

    Those that nothing states are told if ``everything`` is.
    """
    rows = []
    for path, hint, told in keys:
        if mapping_of(hint, told) is not None or path in groups(command):
            continue
        value = selected(config, path)
        default = (
            "needed" if value == "???" else shown(list(value) if isinstance(value, dict) else value)
        )
        default = re.sub(r"^\$\{(\w+)\}$", r"as \1", default)
        experiment, *others = [*only_with(command, path), "", ""]
        if value is None and told.absent and not (experiment or told.added or everything):
            continue
        more = f" (experiment={experiment}{', ...' * bool(others[0])})" if experiment else ""
        rows.append((path, _kind(hint), default, told.help + more))
    wide = [max((len(row[place]) for row in rows), default=0) for place in range(3)]
    return [
        f"{path:{wide[0]}}  {kind:{wide[1]}}  {default:{wide[2]}}  {told}".rstrip()
        for path, kind, default, told in rows
    ]


def _group_help(command: str, group: str, choice: str) -> str:
    """Return the choices of a group, what one of them holds, and what is declared of its keys.

    Raises:
        ValueError: the command has no such group, or the group no such choice.
    """
    own = groups(command)
    if group not in own:
        took = f"expected one of {', '.join(own)}" if own else f"{command}.py has none"
        raise ValueError(f"--help {group}: no such group; {took}")
    listed = _choices(command, group)
    usual = default_choices(command)[group]
    chosen = choice or next(each for each in (usual, *listed) if each and not is_empty(group, each))
    if chosen not in listed:
        raise ValueError(f"--help {group}={choice}: expected one of {', '.join(listed)}")
    text = (config_folder() / group / f"{chosen}.yaml").read_text(encoding="utf-8")
    # Where a file's keys land is said in its first line.
    package = re.match(r"# @package (\S+)\n", text)
    place = package[1] if package else group
    prefix = "" if place == "_global_" else f"{place}."
    keys = [row for row in walk(COMMANDS[command]) if prefix and row[0].startswith(prefix)]
    lines = textwrap.wrap(f"{group}: {', '.join(listed)}", WIDTH, break_on_hyphens=False)
    lines += ["", f"{group}={chosen}; change a key as {prefix}KEY=VALUE"]
    lines += [_methods_help()] if group == "guidance" and not choice else [text.rstrip()]
    config = unresolved(command, [f"{group}={chosen}"])
    table = _key_table(command, keys, config, everything=True)
    return "\n".join([*lines, *([""] if table else []), *table])


def _methods_help() -> str:
    """Return the settings of every guidance method with their defaults and meanings."""

    def told(key: str, method: Method, name: str) -> str:
        setting = f"  guidance.{key}.{name}={shown(method.settings[name])}"
        return f"{setting:44} {method.remarks.get(name, '')}".rstrip()

    lines = []
    for method in methods():
        lines.append(f"{method.key}_scale: {method.title}; {method.neutral:g} is off")
        lines += [told(method.key, method, name) for name in method.settings if name not in OF_ALL]
    return "\n".join(
        [*lines, "every method", *(told("KEY", methods()[0], name) for name in OF_ALL)]
    )


def _kind(hint: Any) -> str:
    """Return a type in a word."""
    kinds: list[str] = []
    for kind in parts(hint):
        if get_origin(kind) is Literal:
            kinds += get_args(kind)
        elif kind is type(None) or kind is Any:
            kinds.append("null" if kind is not Any else "any")
        else:
            kinds.append("mapping" if is_open(kind) else (get_origin(kind) or kind).__name__)
    return "|".join(kinds)
