"""What the sheet of attention shows and tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sag_dit.guidance import SAG
from sag_dit.output.gallery import TOP, heat_colours
from sag_dit.output.sheet import SheetText, outline, write_sheet
from sag_dit.traces import AttentionView, LayerView

LONG = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def view(layers: int = 2, query: bool = True) -> AttentionView:
    rng = np.random.default_rng(0)
    seen = rng.gamma(2.0, size=(layers, 3, 4, 6)).astype(np.float32)
    seen /= seen.mean((2, 3), keepdims=True)
    asked = seen[::-1] / 24
    names = [f"{LONG}.{i}" for i in range(layers)]
    return AttentionView(
        steps=(0, 10, 20),
        times=(999.0, 500.0, 0.0),
        layers=tuple(
            LayerView(name, each, each > 1, of if query else None)
            for name, each, of in zip(names, seen, asked, strict=True)
        ),
        query=(0.5, 0.5) if query else None,
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keeping(self: Figure, *args: object, **how: object) -> None:
        saved.append(self)
        save(self, *args, **how)

    monkeypatch.setattr(Figure, "savefig", keeping)
    return saved


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip()]


def test_colours_and_scale_are_the_gallerys(tmp_path: Path, figures: list[Figure]) -> None:
    wanted = view()
    write_sheet(tmp_path / "sheet.png", wanted, np.zeros((8, 8, 1), np.uint8))
    cells = [axes.images[0] for axes in figures[0].axes if axes.images]
    layer = wanted.layers[0]
    assert layer.query_map is not None
    rows = [*layer.saliency, None, *(24 * layer.query_map)]
    for cell, seen in zip(cells, rows, strict=False):
        if seen is not None:
            rgb = cell.to_rgba(seen, bytes=True)[..., :3].astype(int)
            assert np.abs(rgb - heat_colours(seen / TOP)).max() <= 3  # 256 steps of colour


@pytest.mark.filterwarnings("ignore:Glyph")  # Where no font has them, letters are empty boxes.
def test_everything_is_told_and_nothing_is_cut(tmp_path: Path, figures: list[Figure]) -> None:
    title, words = "a model: $both$ x_0 日本 " * 8, "SAG 0.5 in the second half, layer 5, " * 8
    notes = {f"{LONG}.0": "gate 0.133"}
    file = tmp_path / "sheet.png"
    write_sheet(file, view(), np.zeros((8, 8, 3), np.uint8), SheetText(title, words, "X", notes))
    told = "".join("".join(text.get_text() for text in texts(figures[0])).split())
    for text in (title, words, LONG, "gate 0.133", "step 10", "t = 500", "White outline: X."):
        assert "".join(text.split()) in told
    assert "Gate:howstrongly" in told and "Bluecircle" in told and "Stepsarecountedfrom0" in told
    page = figures[0].bbox
    for text in texts(figures[0]):
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
    # In columns without gates or queries nothing is said of these.
    write_sheet(file, view(query=False), np.zeros((8, 8, 3), np.uint8))
    told = "".join(text.get_text() for text in texts(figures[1]))
    assert "Gate" not in told and "circle" not in told


def test_outline_is_told_as_guidance_has_it() -> None:
    assert outline(SAG(1.0)) == "tokens above 1, which SAG would blur"
    assert outline(SAG(1.0, quantile=0.75)).startswith("the upper 25 % of the tokens")
