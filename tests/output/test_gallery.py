"""The gallery's two files, read back."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sag_dit.output.gallery import CELL, About, Pair, heat_colours, lead, write_gallery
from sag_dit.traces import StepView

AWKWARD = "</script><script>alert('x')</script>, <b>\"été\" & 日本\n\u2028</b> {{data}}"


def image(seed: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def view(index: int, height: int = 4, width: int = 4) -> StepView:
    saliency = np.random.default_rng(index).gamma(2.0, size=(height, width)).astype(np.float32)
    saliency /= saliency.mean()
    return StepView(index, 10, 900.0 - 100 * index, saliency, saliency > 1, 1.0)


def pair(
    index: int, size: tuple[int, int, int] = (8, 8, 1), label: str = "three", steps: int = 3
) -> Pair:
    views = tuple(view(step) for step in range(steps))
    return Pair(index, 100 + index, label, image(index, *size), image(~index % 97, *size), views)


def read(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        page.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def decode(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


class Markup(HTMLParser):
    """The page as a browser's parser sees it: its elements, their text, the addresses it names."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ""
        self.tags: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1] if self.tags else ""
        self.text[tag] = self.text.get(tag, "") + data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.found += [values[key] or "" for key in ("src", "href", "srcset") if key in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""


@pytest.mark.parametrize("size", [(8, 8, 1), (8, 8, 3), (40, 24, 3), (256, 256, 3)])
def test_pixels_come_back_exactly(tmp_path: Path, size: tuple[int, int, int]) -> None:
    entries = [pair(index, size) for index in range(3)]
    data = read(write_gallery(tmp_path, entries, {"steps": 10}, "Digits"))
    assert len(data["entries"]) == 3
    for entry, shown in zip(entries, data["entries"], strict=True):
        np.testing.assert_array_equal(decode(shown["images"]["guided"]), entry.guided)
        np.testing.assert_array_equal(decode(shown["images"]["unguided"]), entry.unguided)
        assert (shown["height"], shown["width"]) == size[:2]
        assert (shown["index"], shown["seed"]) == (entry.index, str(entry.seed))


def test_views_come_back(tmp_path: Path) -> None:
    seen = view(4, height=3, width=5)
    entry = Pair(0, 2**63, "3", image(0, 8, 8, 1), image(1, 8, 8, 1), (seen,))
    data = read(write_gallery(tmp_path, [entry], {}, "t"))
    assert data["entries"][0]["seed"] == str(2**63)
    (shown,) = data["entries"][0]["views"]
    assert (shown["step"], shown["count"], shown["t"]) == (4, 10, "500")
    mask = np.array([bit == "1" for bit in shown["mask"]]).reshape(3, 5)
    np.testing.assert_array_equal(mask, seen.mask)
    np.testing.assert_array_equal(decode(shown["heat"]), heat_colours(seen.saliency / data["top"]))
    assert shown["peak"] == pytest.approx(float(seen.saliency.max()))


def test_difference_is_the_mean_absolute_one() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    white[:4] = 0
    assert Pair(0, 0, "", white, black).difference == pytest.approx(127.5)
    assert Pair(0, 0, "", black, white).difference == pytest.approx(127.5)


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = write_gallery(tmp_path, [pair(0, label="https://example.org/x.png")], {"a": 1}, "t")
    markup = Markup(page)
    assert markup.found
    assert all(found.startswith(("data:", "#")) for found in markup.found)
    # The browser itself then refuses whatever a later edit might add.
    assert markup.policy.startswith("default-src 'none'; img-src data:;")


def test_text_is_escaped(tmp_path: Path) -> None:
    plain = Markup(write_gallery(tmp_path, [pair(0)], {"a": "b"}, "t"))
    page = write_gallery(tmp_path, [pair(0, label=AWKWARD)], {AWKWARD: AWKWARD}, AWKWARD)
    markup = Markup(page)
    assert markup.tags == plain.tags
    assert markup.text["title"].strip() == AWKWARD
    assert markup.text["h1"].strip() == AWKWARD
    data = read(page)
    assert data["entries"][0]["label"] == AWKWARD
    assert data["settings"] == [[AWKWARD, AWKWARD]]


def test_settings_are_flat_and_readable(tmp_path: Path) -> None:
    settings = {
        "sampler": {"name": "ddim", "eta": 0.0},
        "ema": True,
        "classes": None,
        "interval": (0.2, [0.8]),
        "guidance": {},
        "prompt": "a long prompt, far beyond a short line",
    }
    data = read(write_gallery(tmp_path, [pair(0)], settings, "t"))
    assert data["settings"] == [
        ["sampler.name", "ddim"],
        ["sampler.eta", "0.0"],
        ["ema", "true"],
        ["classes", "none"],
        ["interval", "0.2, 0.8"],
        ["guidance", "none"],
        ["prompt", "a long prompt, far beyond a short line"],
    ]


def test_one_colour_scale_for_all_steps(tmp_path: Path) -> None:
    flat = np.ones((4, 4), np.float32)
    strong = flat.copy()
    strong[0] = 6.0
    views = tuple(
        StepView(k, 2, 0.5, saliency, saliency > 1, 1.0)
        for k, saliency in enumerate((flat, strong))
    )
    entry = Pair(0, 0, "", image(0, 8, 8, 1), image(1, 8, 8, 1), views)
    first, second = read(write_gallery(tmp_path, [entry], {}, "t"))["entries"][0]["views"]
    assert (decode(first["heat"])[3] == decode(second["heat"])[3]).all()
    assert (decode(first["heat"])[0] != decode(second["heat"])[0]).any()


def test_heat_rises_in_lightness() -> None:
    srgb = heat_colours(np.linspace(0.0, 1.0, 256)) / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    assert (np.diff(lightness) > -0.5).all()
    assert lightness[0] < 10 and lightness[-1] > 90
    assert heat_colours(np.array([-1.0, 2.0])).tolist() == heat_colours(np.arange(2.0)).tolist()


@pytest.mark.parametrize("size", [(8, 8, 1), (8, 8, 3), (12, 30, 3), (160, 160, 3)])
def test_grid_holds_every_image_enlarged_by_a_whole_number(
    tmp_path: Path, size: tuple[int, int, int]
) -> None:
    entries = [pair(index, size) for index in range(5)]
    write_gallery(tmp_path, entries, {"steps": 10}, "Digits")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.mode == "RGB"
    pixels = np.asarray(grid)
    scale = max(1, -(-CELL // max(size[:2])))
    assert max(size[:2]) * scale >= 96
    places = {}
    for entry in entries:
        for name in ("guided", "unguided"):
            picture = np.broadcast_to(getattr(entry, name), (*size[:2], 3))
            picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            places[name, entry.index] = find(pixels, picture)
    for entry in entries:
        left, right = places["unguided", entry.index], places["guided", entry.index]
        assert left[0] == right[0]
        assert right[1] >= left[1] + size[1] * scale


def find(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    height, width = picture.shape[:2]
    corner = sheet[: sheet.shape[0] - height + 1, : sheet.shape[1] - width + 1]
    for y, x in np.argwhere((corner == picture[0, 0]).all(axis=-1)):
        if (sheet[y : y + height, x : x + width] == picture).all():
            return int(y), int(x)
    raise AssertionError("the picture is not in the sheet")


def test_grid_names_class_and_sides(tmp_path: Path) -> None:
    def drawn(label: str, title: str, words: str) -> np.ndarray:
        write_gallery(tmp_path, [pair(0, label=label)], {}, title, About(words))
        return np.asarray(Image.open(tmp_path / "grid.png"))

    plain = drawn("", "", "")
    assert drawn("three", "", "").shape[0] > plain.shape[0]
    assert drawn("", "Digits", "").shape[0] > plain.shape[0]
    assert drawn("", "", "SAG 0.5, layer 3").shape[0] > plain.shape[0]
    long = drawn("a very long name " * 40, "a long title " * 40, "x" * 999)
    assert long.shape[1] == plain.shape[1]


def test_no_text_of_the_grid_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    ends: list[float] = []
    draw = ImageDraw.ImageDraw.text

    def noting(self: Any, at: tuple[float, float], text: str, **how: Any) -> None:
        texts.append(text)
        left, top, right, bottom = self.textbbox(at, text, how["font"], anchor=how.get("anchor"))
        ends.append(max(-left, -top, right - self.im.size[0], bottom - self.im.size[1]))
        draw(self, at, text, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting)
    label, words = "tench, Tinca tinca and " * 9, "SAG 0.5 in the second half, layer 5, " * 20
    second = replace(pair(3, label=label), spared=image(5, 8, 8, 1))
    about = About(words, spared="all but a method with a long name")
    write_gallery(tmp_path, [second, replace(second, label="W" * 300)], {}, "Digits " * 50, about)
    told = "".join("".join(texts).split())
    for text in (label, words, "W" * 300, "Digits " * 50, about.spared, "unguided", "#3"):
        assert "".join(text.split()) in told
    assert "…" not in told and max(ends) <= 0


def test_grid_without_labels_holds_the_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", None)  # Any text would fail.
    entries = [replace(pair(index), spared=image(50 + index, 8, 8, 1)) for index in range(3)]
    write_gallery(tmp_path, entries, {}, "Digits", About("SAG 1"), labels=False)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    for entry in entries:
        places = [
            find(sheet, np.broadcast_to(each, (8, 8, 3)).repeat(16, axis=0).repeat(16, axis=1))
            for each in entry.images.values()
        ]
        assert len(places) == 3 and places == sorted(places) and len({y for y, _ in places}) == 1


def test_second_twin_is_on_the_page(tmp_path: Path) -> None:
    entry = replace(pair(0), spared=image(5, 8, 8, 1))
    page = write_gallery(tmp_path, [entry, pair(1)], {}, "t", About(spared="all but SAG"))
    data = read(page)
    first, second = data["entries"]
    assert data["spared"] == "all but SAG"
    assert list(first["images"]) == ["unguided", "spared", "guided"]
    np.testing.assert_array_equal(decode(first["images"]["spared"]), entry.spared)
    for name in ("unguided", "spared"):
        change = np.abs(entry.guided.astype(int) - entry.images[name])
        assert first["changes"][name] == {"mean": change.mean(), "most": change.max()}
    assert list(second["images"]) == ["unguided", "guided"]


def test_lead_says_what_guidance_did_and_what_to_look_at(tmp_path: Path) -> None:
    grey = np.full((8, 8, 1), 100, np.uint8)
    about = About(moves="SAG moved each image", look="edges")

    def told(*changes: int, spared: int | None = None) -> str:
        second = None if spared is None else grey + np.uint8(spared)
        pairs = [
            Pair(i, 0, "", grey + np.uint8(c), grey, (), second) for i, c in enumerate(changes)
        ]
        return lead(pairs, replace(about, spared="all but SAG"))

    assert told(10, 30, 20) == (
        "SAG moved each image; it changed a pixel by 20 of 255 on average: look at #1, the most "
        "changed, for edges."
    )
    assert "by 1 of 255 on average, too little to see without the difference view:" in told(1, 1)
    assert told(0, 0) == "SAG moved each image; it changed no pixel of these images."
    assert "SAG changed a pixel by 5 of 255 on average, from the middle" in told(25, spared=20)
    assert lead([pair(0)], About()).startswith("These images were drawn without guidance")
    page = write_gallery(tmp_path, [pair(7)], {}, "t", about).read_text(encoding="utf-8")
    assert "SAG moved each image; it changed" in page and "look at #7, the most" in page


def test_without_views(tmp_path: Path) -> None:
    assert read(write_gallery(tmp_path, [pair(0, steps=0)], {}, "t"))["entries"][0]["views"] == []


def test_no_entries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_gallery(tmp_path / "new", [], {}, "t")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("guided", "unguided", "message"),
    [
        (np.zeros((8, 8, 3)), np.zeros((8, 8, 3), np.uint8), "guided image 7 is float64"),
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8), r"expected uint8 \(H, W, 1\)"),
        (np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8), "differ in shape"),
    ],
)
def test_images_of_another_form(guided: np.ndarray, unguided: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pair(7, 0, "", guided, unguided)


def test_a_second_twin_of_another_shape() -> None:
    fits, other = image(0, 8, 8, 1), image(1, 8, 9, 1)
    with pytest.raises(ValueError, match=r"spared \(8, 9, 1\) image 7 differ in shape"):
        Pair(7, 0, "", fits, fits, (), other)


def test_views_of_another_form() -> None:
    saliency = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="token grid"):
        StepView(0, 1, 0.0, saliency, np.ones((2, 8), bool), 1.0)
    saliency[0, 0] = np.nan
    with pytest.raises(ValueError, match="step 3 holds nan"):
        StepView(3, 9, 0.0, saliency, np.ones((4, 4), bool), 1.0)


def test_blur_guidance_has_no_threshold(tmp_path: Path) -> None:
    everywhere = np.ones((4, 4), np.float32)
    seen = StepView(0, 1, 0.0, everywhere, everywhere > 0, -np.inf)
    entry = Pair(0, 0, "", image(0, 8, 8, 1), image(1, 8, 8, 1), (seen,))
    data = read(write_gallery(tmp_path, [entry], {}, "t"))
    assert data["entries"][0]["views"][0]["threshold"] == 0


def test_old_page_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_gallery(tmp_path, [pair(0)], {}, "old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"index.html", "grid.png"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_gallery(tmp_path, [pair(1)], {}, "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert write_gallery(tmp_path, [pair(1)], {}, "new") == page
    assert page.read_bytes() != before["index.html"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    page = write_gallery(tmp_path, [pair(0)], {}, "t")
    (tmp_path / "other").write_text("")
    assert page.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, sag_dit.output.gallery; "
        "print({'torch', 'lightning', 'hydra', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
