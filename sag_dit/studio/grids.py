"""A strip over one key, or a grid over two: the same noise drawn with other settings."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sag_dit.api import LoadedModel, with_models
from sag_dit.studio import pictures
from sag_dit.studio.asking import Asked, Ready
from sag_dit.studio.controls import Knob

NONE = "none"
"""Stands for the second key of a strip."""
MOST = 64
"""Cells of a grid."""
OTHERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "class": ("label", str),
    "seed": ("seed", int),
    "steps": ("steps", int),
    "sampler": ("sampler", str),
}
"""Keys that are no method's: what :class:`Asked` calls them, and how they are read."""


def keys(knobs: Sequence[Knob]) -> list[str]:
    """Return the keys that a grid can go over, scales first."""
    scales = [knob.path for knob in knobs if knob.kind == "scale" and "." not in knob.name]
    rest = [knob.path for knob in knobs if knob.path not in scales]
    return [*scales, *OTHERS, *rest]


def suggested(key: str, knobs: Sequence[Knob]) -> str:
    """Return values to begin with."""
    usual = {"seed": "0, 1, 2, 3", "steps": "5, 10, 20, 50", "sampler": "ddim, dpmpp_2m"}
    knob = next((knob for knob in knobs if knob.path == key), None)
    if knob is None:
        return usual.get(key, "0, 1, 2, 3" if key == "class" else "")
    if knob.kind == "scale":
        if knob.name.startswith("interval"):
            return "0, 0.25, 0.5, 0.75, 1"
        return ", ".join(f"{knob.neutral + step:g}" for step in (0, 0.25, 0.5, 1, 2, 4))
    if knob.choices:
        return ", ".join(map(str, knob.choices))
    if knob.kind == "switch":
        return "false, true"
    return "auto" if knob.kind == "layers" else "" if knob.default is None else str(knob.default)


def values_of(key: str, text: str, knobs: Sequence[Knob]) -> list[Any]:
    """Return the values that are written, separated by commas.

    Raises:
        ValueError: there are none, or one that the key does not take.
    """
    listed = [each.strip() for each in text.split(",") if each.strip()]
    if not listed:
        raise ValueError(f"{key}: expected values, separated by commas")
    knob = next((knob for knob in knobs if knob.path == key), None)
    if knob is None and key not in OTHERS:
        raise ValueError(f"{key}: no such key")
    try:
        if knob is None:
            return [OTHERS[key][1](each) for each in listed]
        return [knob.parsed(each) for each in listed]
    except ValueError as error:
        told = str(error) if knob is not None else f"{key}={text}: expected whole numbers"
        raise ValueError(told) from None


@dataclass
class Grid:
    """Cells that are drawn one by one; ``y`` is :data:`NONE` in a strip.

    Example::

        for grid in Grid("sag.scale", [0.0, 0.5, 1.0]).drawn(asked, model):
            page = grid.page()
    """

    x: str
    xs: Sequence[Any]
    y: str = NONE
    ys: Sequence[Any] = ("",)
    shown: dict[tuple[int, int], str] = field(default_factory=dict)
    twins: dict[int, str] = field(default_factory=dict)
    look: str = ""

    def __post_init__(self) -> None:
        if len(self.xs) * len(self.ys) > MOST:
            raise ValueError(
                f"{len(self.xs)} x {len(self.ys)} cells: expected at most {MOST}; name fewer values"
            )
        if self.x == self.y:
            raise ValueError(f"{self.x}: expected another key down than across")

    def drawn(self, asked: Asked, model: LoadedModel, ready: Ready = with_models) -> Iterator[Grid]:
        """Draw one image a cell, and yield the grid after each.

        Raises:
            ValueError: settings of a cell that cannot work.
        """
        # Across a method's key all cells of a row begin alike, so one twin stands for all.
        alike = self.x.partition(".")[0] not in OTHERS
        for row, down in enumerate(self.ys):
            for column, across in enumerate(self.xs):
                cell = asked.changed("count", 1).changed(_path_of(self.x), across)
                if self.y != NONE:
                    cell = cell.changed(_path_of(self.y), down)
                first = alike and column == 0
                out = model.sample(**cell.drawing(model, ready), twins=first)
                self.look = pictures.small(out.tensor)
                self.shown[row, column] = pictures.picture(out.tensor[0])
                if first and out.twins_tensor is not None:
                    self.twins[row] = pictures.picture(out.twins_tensor[0])
                yield self

    def page(self) -> str:
        """Return the grid as a table, with what is not drawn yet left empty."""
        corner = "<td></td>" if self.y != NONE else ""
        twins = bool(self.twins)
        head = "".join(f"<th>{html.escape(_heading(each))}</th>" for each in self.xs)
        rows = [f"<tr>{corner}{'<th>unguided</th>' if twins else ''}{head}</tr>"]
        for row, down in enumerate(self.ys):
            side = f"<th>{html.escape(_heading(down))}</th>" if corner else ""
            before = f"<td>{_image(self.twins.get(row), 'unguided')}</td>" if twins else ""
            cells = "".join(
                f"<td>{_image(self.shown.get((row, column)), f'{self.x} {_heading(across)}')}</td>"
                for column, across in enumerate(self.xs)
            )
            rows.append(f"<tr>{side}{before}{cells}</tr>")
        done = len(self.shown) == len(self.xs) * len(self.ys)
        down = f", {self.y} down" if corner else ""
        return (
            f'<div class="grid{self.look}" data-running="{str(not done).lower()}">'
            f"<p>{html.escape(self.x)} across{html.escape(down)}</p>"
            f"<table>{''.join(rows)}</table></div>"
        )


def _path_of(key: str) -> str:
    return OTHERS[key][0] if key in OTHERS else key


def _heading(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _image(uri: str | None, told: str) -> str:
    return "" if uri is None else f'<img src="{uri}" alt="{html.escape(told)}">'
