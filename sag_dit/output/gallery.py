"""The gallery: guided images beside their unguided twins, as one page and as one picture."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sag_dit.files import atomic

if TYPE_CHECKING:
    from sag_dit.traces import StepView

PAGE = "index.html"

CELL = 128  # smaller images are enlarged in grid.png until their longer side has as many pixels
_INK, _SOFT, _LINE = "#1b1b1f", "#6b6b73", "#dededa"
# Pillow's own font knows little beyond ASCII; the others are looked for when a text needs them.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")


@dataclass(frozen=True, eq=False)
class Pair:
    """One pair: an image and its twin drawn from the same noise without guidance.

    guided, unguided: (H, W, C) uint8, C = 1 or 3; label: class name; views: empty without SAG.
    Raises: ValueError for images of another form, or twins that differ in shape.

    Example:
        >>> image = np.zeros((8, 8, 1), np.uint8)
        >>> Pair(index=0, seed=0, label="3", guided=image, unguided=image).difference
        0.0
    """

    index: int
    seed: int
    label: str
    guided: NDArray[np.uint8]
    unguided: NDArray[np.uint8]
    views: tuple[StepView, ...] = ()

    def __post_init__(self) -> None:
        for name, image in (("guided", self.guided), ("unguided", self.unguided)):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                raise ValueError(
                    f"{name} image {self.index} is {image.dtype} {image.shape}, expected uint8 "
                    "(H, W, 1) or (H, W, 3): decode it and move the channels last"
                )
        if self.guided.shape != self.unguided.shape:
            raise ValueError(
                f"guided {self.guided.shape} and unguided {self.unguided.shape} image "
                f"{self.index} differ in shape: draw both with one model at one size"
            )

    @property
    def difference(self) -> float:
        """Mean absolute pixel difference of the twins, 0 to 255."""
        return float(np.abs(self.guided.astype(np.int16) - self.unguided).mean())


def write_gallery(
    folder: Path, entries: Sequence[Pair], settings: Mapping[str, object], title: str
) -> Path:
    """Write `index.html` (one file, no network) and `grid.png` into folder, each atomically.

    Returns: the path of index.html. Raises: ValueError without entries.
    """
    if not entries:
        raise ValueError("a gallery of 0 entries cannot be drawn, expected at least 1: skip it")
    rows = list(flatten(settings))
    short = [f"{name} {value}" for name, value in rows if len(value) <= 24]
    page = _page(entries, {"settings": rows, "short": short}, title)
    grid = io.BytesIO()
    _grid(entries, short, title).save(grid, format="png")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "grid.png") as temporary:
        temporary.write_bytes(grid.getvalue())
    with atomic(folder / PAGE) as temporary:
        temporary.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return folder / PAGE


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colour values in [0, 1] from dark violet to pale yellow, (...) to sRGB (..., 3).

    Lightness rises evenly, so equal steps look equal and the map survives a grey print.
    Source: the Oklab colour space, https://bottosson.github.io/posts/oklab/
    """
    x = np.clip(np.asarray(values, dtype=np.float64), 0.0, 1.0)
    lightness = 0.16 + 0.80 * x
    hue = np.radians(290.0 + 172.0 * x)
    chroma = 0.035 + 0.15 * np.sin(np.pi * x**0.9) ** 0.8
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_lms = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
              [1, -0.0894841775, -1.2914855480]]  # fmt: skip
    to_rgb = [[4.0767416621, -3.3077115913, 0.2309699292],
              [-1.2684380046, 2.6097574011, -0.3413193965],
              [-0.0041960863, -0.7034186147, 1.7076147010]]  # fmt: skip
    linear = np.clip((lab @ np.transpose(to_lms)) ** 3 @ np.transpose(to_rgb), 0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours: NDArray[np.uint8] = np.rint(255.0 * srgb).astype(np.uint8)
    return colours


def _page(entries: Sequence[Pair], about: Mapping[str, object], title: str) -> str:
    saliencies = [view.saliency.ravel() for entry in entries for view in entry.views]
    # One colour scale for the whole page, else steps could not be compared; attention sinks clip.
    top = max(2.0, float(np.percentile(np.concatenate(saliencies), 99.5))) if saliencies else 2.0
    data = {
        **about,
        "entries": [_entry(entry, top) for entry in entries],
        "top": top,
        "ramp": ["#" + rgb.tobytes().hex() for rgb in heat_colours(np.linspace(0.0, 1.0, 17))],
    }
    # Inside a script element only "<" can end it; as an escape it means the same to JSON.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    fields = {"data": embedded, "title": html.escape(title)}
    template = resources.files("sag_dit.output").joinpath("gallery.html").read_text("utf-8")
    return re.sub(r"\{\{(data|title)\}\}", lambda match: fields[match[1]], template)


def _entry(entry: Pair, top: float) -> dict[str, object]:
    return {
        "index": entry.index,
        "seed": str(entry.seed),  # a 64-bit seed does not fit a JavaScript number
        "label": entry.label,
        "width": entry.guided.shape[1],
        "height": entry.guided.shape[0],
        "guided": data_uri(entry.guided),
        "unguided": data_uri(entry.unguided),
        "difference": entry.difference,
        "views": [_view(view, top) for view in entry.views],
    }


def _view(view: StepView, top: float) -> dict[str, object]:
    return {
        "step": view.index + 1,
        "count": view.count,
        "t": f"{view.t:.4g}",
        "threshold": max(0.0, view.threshold),
        "width": view.mask.shape[1],
        "height": view.mask.shape[0],
        "heat": data_uri(heat_colours(view.saliency / top)),
        "mask": "".join("1" if token else "0" for token in view.mask.ravel()),
        "peak": float(view.saliency.max()),
    }


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def data_uri(image: NDArray[np.uint8]) -> str:
    """Return an image (H, W, 1 or 3) as a PNG that stands in the page itself."""
    png = io.BytesIO()
    _picture(image).save(png, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")


def flatten(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested settings as text, by their keys joined with dots."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value_text(value)


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or (isinstance(value, Mapping | Sequence) and not value):
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(_value_text(item) for item in value)
    return str(value)


def _grid(entries: Sequence[Pair], short: Sequence[str], title: str) -> Image.Image:
    height, width, _ = np.max([entry.guided.shape for entry in entries], axis=0).tolist()
    scale = max(1, math.ceil(CELL / max(height, width)))
    height, width = height * scale, width * scale
    title, *texts = (
        " ".join(text.split()) for text in (title, *short, *(entry.label for entry in entries))
    )
    size = min(40, max(16, width // 10))
    font = _font(size, "".join((title, *texts)))
    small, large = (font.font_variant(size=round(ratio * size)) for ratio in (0.85, 1.3))

    gap, line = max(4, width // 32), round(1.4 * size)
    margin = 5 * gap
    pair_width, pair_height = 2 * width + gap, height + 2 * line

    def shape(columns: int) -> tuple[int, int]:
        rows = math.ceil(len(entries) / columns)
        return columns * (pair_width + margin), rows * (pair_height + margin)

    # As near as can be to a landscape page.
    columns = min(
        range(1, len(entries) + 1), key=lambda n: abs(math.log(1.5 * shape(n)[1] / shape(n)[0]))
    )
    room = shape(columns)[0] - margin
    head = _wrap(texts[: -len(entries)], small, room)
    top = 2 * margin + 2 * size + len(head[:4]) * line
    sheet = Image.new("RGB", (room + 2 * margin, top + shape(columns)[1]), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), _shortened(title, large, room), fill=_INK, font=large)
    for row, text in enumerate(head[:3] + ["…"] * (len(head) > 3)):
        draw.text((margin, margin + 2 * size + row * line), text, fill=_SOFT, font=small)
    draw.line((margin, top - margin // 2, margin + room, top - margin // 2), fill=_LINE)

    for place, (entry, label) in enumerate(zip(entries, texts[-len(entries) :], strict=True)):
        x = margin + place % columns * (pair_width + margin)
        y = top + place // columns * (pair_height + margin)
        number = f"#{entry.index}"
        fitted = _shortened(label, font, pair_width - small.getlength(number) - size)
        draw.text((x, y), fitted, fill=_INK, font=font)
        draw.text((x + pair_width, y), number, fill=_SOFT, font=small, anchor="ra")
        for name, image in (("unguided", entry.unguided), ("guided", entry.guided)):
            picture = ImageOps.scale(_picture(image), scale, Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + line))
            draw.text((x, y + line + height + size // 5), name, fill=_SOFT, font=small)
            x += width + gap
    return sheet


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    def known(font: ImageFont.FreeTypeFont) -> int:
        unknown = bytes(font.getmask("\U0010ffff"))
        return sum(bytes(font.getmask(char)) != unknown for char in set(text))

    return max(_installed(size), key=known)


def _installed(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    own = ImageFont.load_default(size)
    if not isinstance(own, ImageFont.FreeTypeFont):
        raise ImportError("this Pillow was built without FreeType: install the wheel from PyPI")
    yield own
    for name in _FONTS:
        with contextlib.suppress(OSError):
            yield ImageFont.truetype(name, size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    cut = bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "…"))
    return text[: max(0, cut - 1)].rstrip() + "…"


def _wrap(pieces: Sequence[str], font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for piece in pieces:
        longer = f"{lines[-1]}   ·   {piece}" if lines[-1] else piece
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shortened(piece, font, width))
    return [line for line in lines if line]
