"""The sheet: what each self-attention layer saw of one image, step by step, as one picture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from sag_dit.files import atomic
from sag_dit.output.gallery import TOP, heat_colours, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sag_dit.guidance import SAG
    from sag_dit.traces import AttentionView

OTHER_FONTS = ("Noto Sans CJK JP", "Arial Unicode MS", "Noto Sans")
"""Looked for beside matplotlib's own, which knows little beyond European letters."""
DPI, SIZE = 110, 9.0
"""Dots in an inch of the picture, and points of its text."""
NAME = 24
"""Characters of a layer's name in a line."""
GATE = (
    "Gate: how strongly the layer's result is added to the tokens (mean over steps); near 0 the "
    "layer says little to the image, whatever its map looks like."
)


@dataclass(frozen=True)
class SheetText:
    """What a sheet tells beside its maps.

    title: model, class and image. words: the settings. outline: what is within the white lines.
    notes: by layer, what stands below its name.

    Example:
        >>> SheetText("digits: class 3", "SAG 0.5, layer 3; 50 steps of ddim, seed 0").notes
        {}
    """

    title: str = ""
    words: str = ""
    outline: str = "tokens that SAG would blur"
    notes: Mapping[str, str] = field(default_factory=dict)


def outline(limit: SAG) -> str:
    """Return what is within the outlines of masks that guidance with such a limit sets.

    Example:
        >>> from sag_dit.guidance import SAG
        >>> outline(SAG(0.5, threshold=1.3))
        'tokens above 1.3, which SAG would blur'
    """
    if limit.quantile is not None:
        return f"the upper {100 * (1 - limit.quantile):.3g} % of the tokens, which SAG would blur"
    return f"tokens above {limit.threshold:g}, which SAG would blur"


def write_sheet(
    file: Path, view: AttentionView, image: NDArray[np.uint8], text: SheetText | None = None
) -> None:
    """Draw a view: a row of saliency for each layer, and one of the query's map where it was kept.

    The mask's border is drawn on the saliency. Colours are those of the gallery and run from 0 to
    ``TOP`` times the average attention in every cell, so that layers and steps compare; ``image``
    (h, w, 1 or 3) closes each row.
    """
    from matplotlib import font_manager, rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    text = text or SheetText()
    rows = [
        (layer, kind)
        for layer in view.layers
        for kind in ("saliency", "query")
        if kind == "saliency" or layer.query_map is not None
    ]
    columns = len(view.steps) + 1
    width = max(5.0, 1.9 + 1.1 * columns)
    # What stands above and below the maps, in lines that fit.
    told = [
        f"Colour: the attention that a token receives; 1 is the average. White outline: "
        f"{text.outline}. Steps are counted from 0, the noisiest.",
        *([GATE] if text.notes else []),
        *(["Blue circle: the token whose own attention is shown below."] if view.query else []),
    ]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), round(SIZE * DPI / 72))
    room = 0.95 * width * DPI

    def length(line: str) -> float:
        # Letters of other scripts come from other fonts, and are at most as wide as high.
        return font.getlength("".join(each if each < "\u2000" else "—" for each in line))

    below = "\n".join(line for each in told for line in wrapped(each, length, room))
    head = [line for each in (text.title, text.words) for line in wrapped(each, length, room)]
    height = 0.8 + 1.1 * len(rows) + 0.2 * (below.count("\n") + len(head) + 2)
    names = {each.name for each in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(each for each in OTHER_FONTS if each in names)]
    colours = ListedColormap(heat_colours(np.linspace(0.0, 1.0, 256)) / 255.0)
    with rc_context({"font.family": family, "text.parse_math": False}), warnings.catch_warnings():
        # A letter that no font knows is an empty box.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        maps = figure.add_gridspec(len(rows), columns)
        axes = maps.subplots(squeeze=False)
        for row, (layer, kind) in enumerate(rows):
            for column in range(columns):
                cell = axes[row, column]
                cell.set_xticks([])
                cell.set_yticks([])
                if column == len(view.steps):
                    cell.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
                    continue
                if kind == "saliency":
                    seen = layer.saliency[column]
                    _outlined(cell, layer.mask[column])
                else:
                    assert layer.query_map is not None and view.query is not None
                    seen = layer.query_map[column] * layer.query_map[column].size
                    at = int(view.query[1] * seen.shape[1]), int(view.query[0] * seen.shape[0])
                    cell.plot(*at, "o", mfc="none", mec="deepskyblue", mew=1.5, ms=6)
                shown = cell.imshow(seen, cmap=colours, vmin=0, vmax=TOP)
                if row == 0:
                    at_time = f"step {view.steps[column]}\nt = {view.times[column]:.4g}"
                    cell.set_title(at_time, fontsize=8)
            # The layer's name, with what is noted of it.
            name = (
                _broken(layer.name) if kind == "saliency" else "what the circled\ntoken attends to"
            )
            note = text.notes.get(layer.name, "") if kind == "saliency" else ""
            axes[row, 0].set_ylabel(
                f"{name}\n{note}".strip(), fontsize=8, rotation=0, ha="right", va="center"
            )
        axes[0, -1].set_title("image", fontsize=8)
        bar = figure.colorbar(
            shown, ax=axes, shrink=min(1.0, 3 / len(rows)), aspect=12, pad=0.01, extend="max"
        )
        bar.set_label("attention, 1 = average", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        figure.suptitle("\n".join(head), x=0.01, ha="left", fontsize=SIZE)
        figure.supxlabel(below, x=0.01, ha="left", fontsize=SIZE)
        with atomic(file) as temporary:
            figure.savefig(temporary, format="png")


def _outlined(cell: Axes, mask: NDArray[np.bool_]) -> None:
    """Draw a mask's border along the borders of tokens, so that none looks half masked."""
    if not mask.any() or mask.all():
        return
    sharp = np.kron(mask.astype(float), np.ones((8, 8)))
    across, down = (np.linspace(-0.5, size - 0.5, 8 * size) for size in mask.shape[::-1])
    # White alone would be lost on the lightest colours.
    for colour, width in (("black", 1.8), ("white", 0.8)):
        cell.contour(across, down, sharp, [0.5], colors=colour, linewidths=width)


def _broken(name: str) -> str:
    """Break a layer's name at its dots into short lines."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1] + part) > NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
