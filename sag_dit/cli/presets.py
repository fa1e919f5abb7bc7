"""What the bundled models are drawn and measured with unless the user states otherwise.

A model has settings where configs/guidance and configs/compare have a file of its name; scales are
those of the comparison's row that the catalogue names as its ``preset``. docs/evaluation.md and the
models' cards tell how they were chosen. What a preset in a folder of the user's own states, such as
one that tune.py has written, counts as stated by the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sag_dit.catalogue import entries
from sag_dit.cli.composing import config_folder
from sag_dit.cli.typed import HELP, choices
from sag_dit.untrusted import read_yaml


def with_presets(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with those of a bundled model's settings before that it does not state.

    An experiment brings settings of its own, so nothing is added beside one.
    """
    if set(HELP) & set(arguments):
        return list(arguments)
    stated: dict[str, Any] = dict(
        argument.lstrip("+").split("=", 1)
        for argument in arguments
        if "=" in argument and "={" not in argument  # A mapping is merged into a choice.
    )
    stated |= _of_own_preset(arguments, stated.get("guidance", ""))
    default = _yaml(f"{command}.yaml")["ckpt"]
    model = str(stated.get("ckpt", default)).strip("'\"")
    if not {model} <= {*choices("guidance")} & {*choices("compare")} or "experiment" in stated:
        return list(arguments)
    preset = {"guidance": model}
    if command == "sample":
        preset |= _yaml(f"compare/{model}.yaml")[entries()[model].preset]
    else:
        preset |= {"compare": model}
    return [*(f"{key}={value}" for key, value in preset.items() if key not in stated), *arguments]


def _of_own_preset(arguments: Sequence[str], name: str) -> dict[str, Any]:
    """Return what a preset of guidance states that lies in a folder of the user's own."""
    flags = ("-cd", "--config-dir")
    folders = [after for flag, after in pairwise(arguments) if flag in flags]
    folders += [each.partition("=")[2] for each in arguments if each.startswith("--config-dir=")]
    file = Path(*folders[-1:]) / "guidance" / f"{name}.yaml"
    if not folders or not file.is_file():
        return {}
    with suppress(ValueError):  # Hydra tells what is wrong with it.
        return read_yaml(file)
    return {}


def comparison_of(model: str) -> dict[str, dict[str, Any]]:
    """Return the rows that evaluate.py compares of a model: its own, or those of any other."""
    own = model in entries("bundled") and model in choices("compare")
    rows: dict[str, dict[str, Any]] = _yaml(f"compare/{model if own else 'guidance'}.yaml")
    return rows


def _yaml(file: str) -> Any:
    return yaml.safe_load((config_folder() / file).read_text(encoding="utf-8"))
