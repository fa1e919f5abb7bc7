"""``-m``: the settings of a sweep, which evaluate.py measures together, each model loaded once.

Hydra's own multirun would compose them one by one, and leaves a file where one stands.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from sag_dit.cli.composing import quoted
from sag_dit.cli.typed import MULTIRUN
from sag_dit.identity import digest

LONGEST = 120
"""Letters of a folder's name that tells a setting."""

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Choice:
    """One setting of a sweep: what distinguishes it, and the arguments that compose it.

    Example:
        >>> [choice.axes for choice in expand(["-m", "steps=10,20", "seed=3"]) or ()]
        [{'steps': 10}, {'steps': 20}]
    """

    axes: dict[str, Value]
    arguments: list[str]

    @property
    def name(self) -> str:
        """What distinguishes it, in a word that can name a folder."""
        told = ",".join(f"{key}={value}" for key, value in self.axes.items())
        plain = re.sub(r"[^\w.,=+-]+", "_", told)[:LONGEST]
        return plain if plain == told else f"{plain}-{digest(self.axes)[:8]}"

    @property
    def out(self) -> str | None:
        """The folder that the arguments state, as it is written there."""
        stated = [each for each in self.arguments if each.lstrip("+").startswith("out=")]
        value = stated[-1].partition("=")[2] if stated else "null"
        return None if value in ("null", "") else value

    def in_its_own_folder(self) -> Choice:
        """Return it with a folder of its own within the one that is stated, if one is."""
        if self.out is None:
            return self
        kept = [each for each in self.arguments if not each.lstrip("+").startswith("out=")]
        parent = yaml.safe_load(self.out) if self.out[0] in "\"'" else self.out
        return replace(self, arguments=[*kept, f"out={parent}/{self.name}"])


def expand(arguments: Sequence[str]) -> list[Choice] | None:
    """Return the settings that ``-m`` asks for, the last key changing fastest; None without ``-m``.

    ``key=a,b``, ``key=range(0,1,0.25)`` and the like are Hydra's grammar.

    Raises:
        ValueError: ``-m`` without a key of several values.
        HydraException: an argument that is not in the grammar.
    """
    if not any(argument in MULTIRUN for argument in arguments):
        return None
    # Each setting has a folder of its own within out.
    several = [each for each in arguments if re.match(r"\+*out=(?!['\"]).*,", each)]
    if several:
        raise ValueError(
            f"{several[0]}: expected one folder; with -m every setting gets its own within it"
        )
    # The keys of several values, and all others as they stand.
    parser = OverridesParser.create()
    kept: list[str] = []
    swept: dict[str, list[tuple[Value, str]]] = {}
    for argument in arguments:
        if argument in MULTIRUN:
            continue
        if "=" not in argument or argument.startswith("-"):
            kept.append(argument)
            continue
        override = parser.parse_overrides([quoted(argument)])[0]
        if not override.is_sweep_override():
            kept.append(argument)
            continue
        key = override.get_key_element()
        swept[key] = [
            (yaml.safe_load(text), f"{key}={text}") for text in override.sweep_string_iterator()
        ]
    for key, values in swept.items():
        if not values:
            raise ValueError(f"-m: of {key} no value is left; expected two or more")
    if not swept:
        raise ValueError(
            "-m: no key has several values; expected for instance sag_scale=0,0.25,0.5,1"
        )
    # Every combination of them.
    return [
        Choice(
            {key.lstrip("+"): value for key, (value, _) in zip(swept, chosen, strict=True)},
            [*kept, *(text for _, text in chosen)],
        )
        for chosen in itertools.product(*swept.values())
    ]
