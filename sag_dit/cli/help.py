"""``--help``: a command with all its keys, or one of its groups."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin

from sag_dit.bounds import parts, shown
from sag_dit.cli.composing import config_folder, unresolved
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import mapping_of, selected, walk
from sag_dit.cli.typed import choices, experiments, groups
from sag_dit.methods import OF_ALL, Method, methods


def help_text(command: str, topic: str | None = None) -> str:
    """Return what ``--help`` prints: the command, or one of its groups."""
    if topic is not None:
        return _group_help(topic)
    found = COMMANDS[command]
    config = unresolved(command)
    own = groups(command)
    lines = [inspect.cleandoc(found.__doc__ or ""), "", *getattr(found, "examples", ()), ""]
    for path, hint, told in walk(found):
        inner = mapping_of(hint, told)
        if path.split(".")[0] in own or inner is not None:
            continue
        value = selected(config, path)
        default = "needed" if value == "???" else shown(value)
        lines.append(f"{path:24} {_kind(hint):14} {default:12} {told.help}".rstrip())
    lines += ["", "groups (GROUP=CHOICE; --help GROUP shows what a choice holds):"]
    for group in own:
        listed = experiments(command) if group == "experiment" else choices(group)
        lines.append(f"{group:12} {', '.join(listed)}")
    return "\n".join(lines)


def _group_help(group: str) -> str:
    """Return the choices of a group, and what its default or first choice holds.

    Raises:
        ValueError: there is no such group.
    """
    listed = choices(group) if (config_folder() / group).is_dir() else []
    if not listed:
        raise ValueError(f"--help {group}: no such group")
    first = "default" if "default" in listed else listed[0]
    text = (config_folder() / group / f"{first}.yaml").read_text()
    if group == "guidance":
        text = _methods_help()
    head = f"{group}: {', '.join(listed)}"
    return f"{head}\n\n{group}={first}; change a key as {group}.KEY=VALUE\n{text}"


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
            kinds.append((get_origin(kind) or kind).__name__)
    return "|".join(kinds)
