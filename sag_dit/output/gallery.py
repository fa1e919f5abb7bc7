"""The gallery: guided images beside their twins, as one page and as one picture."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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

TOP = 3.0
"""The saliency, as a multiple of the average, at which colours end, in every map that is shown."""

FAINT = 2.0
"""Mean change of a pixel, of 255, below which twins look the same at first sight."""

CELL = 128  # smaller images are enlarged in grid.png until their longer side has as many pixels
_INK, _SOFT, _LINE = "#1b1b1f", "#6b6b73", "#dededa"
# Pillow's own font knows little beyond ASCII; the others are looked for when a text needs them.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and its twin drawn from the same noise without guidance.

    guided, unguided: (H, W, C) uint8, C = 1 or 3; label: class name; views: empty without SAG.
    spared: a second twin, drawn without one of several methods alone.
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
    spared: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for name, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                raise ValueError(
                    f"{name} image {self.index} is {image.dtype} {image.shape}, expected uint8 "
                    "(H, W, 1) or (H, W, 3): decode it and move the channels last"
                )
            if image.shape != self.guided.shape:
                raise ValueError(
                    f"guided {self.guided.shape} and {name} {image.shape} image {self.index} "
                    "differ in shape: draw both with one model at one size"
                )

    @property
    def images(self) -> dict[str, NDArray[np.uint8]]:
        """The images from left to right, the guided one last."""
        spared = {} if self.spared is None else {"spared": self.spared}
        return {"unguided": self.unguided, **spared, "guided": self.guided}

    def change(self, twin: str = "unguided") -> NDArray[np.int16]:
        """Return by how much each value of the guided image differs from that of a twin."""
        change: NDArray[np.int16] = np.abs(self.guided.astype(np.int16) - self.images[twin])
        return change

    @property
    def difference(self) -> float:
        """Mean absolute pixel difference of the twins, 0 to 255."""
        return float(self.change().mean())


@dataclass(frozen=True)
class About:
    """What a gallery tells of how its images were drawn; all may be left empty.

    words: the settings in words; moves and look: what guidance did, and what to look at. spared:
    what the second twin is called. command and python: what draws the images again.

    Example:
        >>> About(words="SAG 0.5, layer 3").spared
        ''
    """

    words: str = ""
    moves: str = ""
    look: str = ""
    spared: str = ""
    command: str = ""
    python: str = ""


def write_gallery(
    folder: Path,
    entries: Sequence[Pair],
    settings: Mapping[str, object],
    title: str,
    about: About | None = None,
    *,
    labels: bool = True,
) -> Path:
    """Write `index.html` (one file, no network) and `grid.png` into folder, each atomically.

    Without ``labels`` the picture holds the images alone.
    Returns: the path of index.html. Raises: ValueError without entries.
    """
    if not entries:
        raise ValueError("a gallery of 0 entries cannot be drawn, expected at least 1: skip it")
    about = about or About()
    page = _page(entries, list(flatten(settings)), title, about)
    grid = io.BytesIO()
    _grid(entries, title, about, labels).save(grid, format="png")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "grid.png") as temporary:
        temporary.write_bytes(grid.getvalue())
    with atomic(folder / PAGE) as temporary:
        temporary.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return folder / PAGE


def lead(entries: Sequence[Pair], about: About) -> str:
    """Return a sentence that says what guidance did to the images, and what to look at.

    Example:
        >>> dark, light = np.zeros((8, 8, 1), np.uint8), np.full((8, 8, 1), 9, np.uint8)
        >>> lead([Pair(4, 0, "3", light, dark)], About(moves="SAG moved them", look="edges"))
        'SAG moved them; it changed a pixel by 9 of 255 on average: look at #4, the most changed, for edges.'
    """  # noqa: E501
    if not about.moves:
        return "These images were drawn without guidance, so each is the same as its twin."
    twin = "spared" if all(entry.spared is not None for entry in entries) else "unguided"
    changes = [float(entry.change(twin).mean()) for entry in entries]
    most = entries[int(np.argmax(changes))]
    mean = float(np.mean(changes))
    if mean == 0:
        return f"{about.moves}; it changed no pixel of these images."
    faint = ", too little to see without the difference view" if mean < FAINT else ""
    amount = f"{mean:.2g}" if mean < 10 else f"{mean:.0f}"
    changed = f"changed a pixel by {amount} of 255 on average{faint}"
    where = f"look at #{most.index}, the most changed, for {about.look}"
    if twin == "spared":
        method = about.spared.removeprefix("all but ")
        return f"{about.moves}; {method} {changed}, from the middle column to the right: {where}."
    return f"{about.moves}; it {changed}: {where}."


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


def _page(
    entries: Sequence[Pair], settings: Sequence[tuple[str, str]], title: str, about: About
) -> str:
    data = {
        "settings": settings,
        "words": about.words,
        "spared": about.spared,
        "command": about.command,
        "python": about.python,
        "entries": [_entry(entry) for entry in entries],
        "top": TOP,
        "ramp": ["#" + rgb.tobytes().hex() for rgb in heat_colours(np.linspace(0.0, 1.0, 17))],
    }
    # Inside a script element only "<" can end it; as an escape it means the same to JSON.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    fields = {
        "data": embedded,
        "title": html.escape(title),
        "lead": html.escape(lead(entries, about)),
    }
    template = resources.files("sag_dit.output").joinpath("gallery.html").read_text("utf-8")
    return re.sub(r"\{\{(data|title|lead)\}\}", lambda match: fields[match[1]], template)


def _entry(entry: Pair) -> dict[str, object]:
    changes = {name: entry.change(name) for name in entry.images if name != "guided"}
    return {
        "index": entry.index,
        "seed": str(entry.seed),  # a 64-bit seed does not fit a JavaScript number
        "label": entry.label,
        "width": entry.guided.shape[1],
        "height": entry.guided.shape[0],
        "images": {name: data_uri(image) for name, image in entry.images.items()},
        "changes": {
            name: {"mean": float(change.mean()), "most": int(change.max())}
            for name, change in changes.items()
        },
        "views": [_view(view) for view in entry.views],
    }


def _view(view: StepView) -> dict[str, object]:
    return {
        "step": view.index,
        "count": view.count,
        "t": f"{view.t:.4g}",
        "threshold": max(0.0, view.threshold),
        "width": view.mask.shape[1],
        "height": view.mask.shape[0],
        "heat": data_uri(heat_colours(view.saliency / TOP)),
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


def _grid(entries: Sequence[Pair], title: str, about: About, labels: bool) -> Image.Image:
    """Draw all pairs on one sheet; text is wrapped, never cut."""
    height, width, _ = np.max([entry.guided.shape for entry in entries], axis=0).tolist()
    scale = max(1, math.ceil(CELL / max(height, width)))
    height, width = height * scale, width * scale
    # The images of a row, and what stands below them.
    names = {"unguided": "unguided", "spared": about.spared, "guided": "guided"}
    if any(entry.spared is None for entry in entries):
        del names["spared"]
    elif labels:
        names["guided"] = "all"
    title, words, *tops = (
        " ".join(text.split()) for text in (title, about.words, *(each.label for each in entries))
    )
    size = min(40, max(16, width // 10))
    font = _font(size, "".join((title, words, *tops)))
    small, large = (font.font_variant(size=round(ratio * size)) for ratio in (0.85, 1.3))

    gap, line = max(4, width // 32), round(1.4 * size)
    margin = 5 * gap
    pair_width = len(names) * width + (len(names) - 1) * gap
    number = small.getlength(f"#{max(entry.index for entry in entries)}") + size
    above = [wrapped(text, font.getlength, pair_width - number) if labels else [] for text in tops]
    below = {
        name: wrapped(text, small.getlength, width) if labels else []
        for name, text in names.items()
    }
    label_lines, caption_lines = max(map(len, above)), max(map(len, below.values()))
    pair_height = height + (label_lines + caption_lines) * line

    def shape(columns: int) -> tuple[int, int]:
        rows = math.ceil(len(entries) / columns)
        return columns * (pair_width + margin), rows * (pair_height + margin)

    def unlike(columns: int) -> float:
        """How far a sheet is from a landscape page without empty places."""
        wide, high = shape(columns)
        return abs(math.log(1.5 * high / wide)) + -len(entries) % columns / len(entries)

    columns = min(range(1, len(entries) + 1), key=unlike)
    room = shape(columns)[0] - margin
    titles, head = (wrapped(title, large.getlength, room), wrapped(words, small.getlength, room))
    if not labels:
        titles, head = [], []
    top = margin + len(titles) * 2 * size + len(head) * line + margin * labels
    sheet = Image.new("RGB", (room + 2 * margin, top + shape(columns)[1]), "white")
    draw = ImageDraw.Draw(sheet)
    y = margin
    for text in titles:
        draw.text((margin, y), text, fill=_INK, font=large)
        y += 2 * size
    for text in head:
        draw.text((margin, y), text, fill=_SOFT, font=small)
        y += line
    if labels:
        draw.line((margin, top - margin // 2, margin + room, top - margin // 2), fill=_LINE)

    for place, (entry, label) in enumerate(zip(entries, above, strict=True)):
        x = margin + place % columns * (pair_width + margin)
        y = top + place // columns * (pair_height + margin)
        for row, text in enumerate(label):
            draw.text((x, y + row * line), text, fill=_INK, font=font)
        if labels:
            draw.text((x + pair_width, y), f"#{entry.index}", fill=_SOFT, font=small, anchor="ra")
        y += label_lines * line
        for name, caption in below.items():
            picture = _picture(entry.images[name])
            picture = ImageOps.scale(picture, scale, Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y))
            for row, text in enumerate(caption):
                at = (x, y + height + size // 5 + row * line)
                draw.text(at, text, fill=_SOFT, font=small)
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


def wrapped(text: str, length: Callable[[str], float], width: float) -> list[str]:
    """Break a text into lines that fit, between words, and within a word that is too long.

    Example:
        >>> wrapped("a long class", len, 6)
        ['a long', 'class']
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width:
            lines[-1] = longer
            continue
        while length(word) > width and len(word) > 1:
            fits = bisect_right(range(1, len(word)), width, key=lambda n: length(word[:n]))
            lines.append(word[: max(1, fits)])
            word = word[max(1, fits) :]
        lines.append(word)
    return [line for line in lines if line]
