"""``sag-dit`` and ``python -m sag_dit``: one entry to all commands, which lists them."""

from __future__ import annotations

import sys
from importlib import import_module

from sag_dit.cli.app import fail, say
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.typed import HELP
from sag_dit.messages import nearest

MODELS = "models"


def main() -> None:
    """Run the command that the first argument names, or list all."""
    name, *arguments = sys.argv[1:] or [HELP[0]]
    if name in HELP:
        say(listing())
    elif name == MODELS and not arguments:
        say(models())
    elif name in COMMANDS:
        # Other ranks are started with the name before the arguments, as the user wrote it.
        import_module(f"sag_dit.cli.{name}").main(arguments, [name])
    else:
        told = f"{name}: takes no arguments" if name == MODELS else f"{name}: no such command"
        fail(f"{told}; sag-dit lists what there is{nearest(name, [*COMMANDS, MODELS])}")


def listing() -> str:
    """Return all commands, a line each."""
    told = {name: (schema.__doc__ or "").partition("\n")[0] for name, schema in COMMANDS.items()}
    told[MODELS] = "List the models that have names: size, licence, and whether they are here."
    lines = [f"  {name:10} {text}" for name, text in told.items()]
    return "\n".join(
        ["sag-dit COMMAND KEY=VALUE ...; sag-dit COMMAND --help shows its keys", "", *lines]
    )


def models() -> str:
    """Return what can be loaded by name, a line each, and where it is looked for."""
    from sag_dit.checkpoints import zoo

    lines = [f"{'name':28} {'kind':12} {'pixels':>6} {'MB':>6}  {'licence':16} file"]
    for each in zoo.listed():
        entry = each.entry
        size = f"{entry.size / 1e6:,.0f}" if entry.size else "?"
        where = f"{each.found}" if each.found else f"not here: {entry.file or entry.repository}"
        lines.append(
            f"{entry.name:28} {entry.kind:12} {entry.resolution or '':>6} {size:>6}  "
            f"{entry.licence or 'not known':16} {where}"
        )
    folders = ", ".join(str(folder.absolute()) for folder in zoo.local_folders())
    return "\n".join(
        [
            *lines,
            "",
            f"Files are looked for in {folders} (${zoo.WEIGHTS_FOLDER} names a further folder),",
            "then in the hub's cache, and at the hub when they are loaded.",
        ]
    )
