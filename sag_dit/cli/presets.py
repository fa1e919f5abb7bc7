"""What the bundled models are drawn and measured with unless the user states otherwise.

The settings stand in configs/guidance and configs/compare under the models' names; how they were
chosen, docs/evaluation.md tells.
"""

from __future__ import annotations

from collections.abc import Sequence

SCALES = {"digits": {"sag_scale": "0.3"}, "patches": {"sag_scale": "0.5"}}
"""SAG's scale of each bundled model in ``sample.py``."""
DRAWN = {"sample": "digits"}
"""The model of a command that is told none."""


def with_presets(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with those of a bundled model's settings before that it does not state.

    An experiment brings settings of its own, so nothing is added beside one.
    """
    stated = dict(
        argument.lstrip("+").split("=", 1)
        for argument in arguments
        if "=" in argument and "={" not in argument  # A mapping is merged into a choice.
    )
    model = stated.get("ckpt", DRAWN.get(command, "")).strip("'\"")
    if model not in SCALES or "experiment" in stated:
        return list(arguments)
    preset = {"guidance": model}
    preset |= SCALES[model] if command == "sample" else {"compare": model}
    return [*(f"{key}={value}" for key, value in preset.items() if key not in stated), *arguments]
