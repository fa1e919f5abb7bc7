"""What the bundled models are drawn and measured with unless the user states otherwise.

A model has settings where configs/guidance and configs/compare have a file of its name; SAG's scale
is that of the comparison's row ``sag``. docs/evaluation.md tells how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from sag_dit.cli.composing import config_folder
from sag_dit.cli.typed import HELP, choices


def with_presets(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with those of a bundled model's settings before that it does not state.

    An experiment brings settings of its own, so nothing is added beside one.
    """
    if set(HELP) & set(arguments):
        return list(arguments)
    stated = dict(
        argument.lstrip("+").split("=", 1)
        for argument in arguments
        if "=" in argument and "={" not in argument  # A mapping is merged into a choice.
    )
    default = _yaml(f"{command}.yaml")["ckpt"]
    model = str(stated.get("ckpt", default)).strip("'\"")
    if not {model} <= {*choices("guidance")} & {*choices("compare")} or "experiment" in stated:
        return list(arguments)
    preset = {"guidance": model}
    if command == "sample":
        preset |= _yaml(f"compare/{model}.yaml")["sag"]
    else:
        preset |= {"compare": model}
    return [*(f"{key}={value}" for key, value in preset.items() if key not in stated), *arguments]


def _yaml(file: str) -> Any:
    return yaml.safe_load((config_folder() / file).read_text(encoding="utf-8"))
