"""The gallery in a real browser: opened from disk without a network, clicked, looked at."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sag_dit.output.gallery import Pair, write_gallery
from sag_dit.traces import StepView

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LABEL = "</script><script>document.title = 'taken'</script> <b>\"quoted\", it's</b> 日本"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, NAMES)), driver.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        opened = driver.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


def entry(index: int, steps: int, size: tuple[int, int, int] = (8, 8, 1)) -> Pair:
    rng = np.random.default_rng(index)
    views = []
    for step in range(steps):
        saliency = rng.gamma(2.0, size=(4, 4)).astype(np.float32)
        saliency /= saliency.mean()
        views.append(StepView(10 * step, 30, 900.0 - step, saliency, saliency > 1, 1.0))
    guided, unguided = rng.integers(0, 256, (2, *size), dtype=np.uint8)
    return Pair(index, index, LABEL, guided, unguided, tuple(views))


class Opened:
    """A page, what it complained about, and what it asked for."""

    def __init__(self, browser: playwright.Browser, path: Path, **options: object) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def look(self, selector: str) -> bytes:
        shot: bytes = self.page.locator(selector).first.screenshot()
        return shot

    def rest(self) -> None:
        self.page.mouse.move(2, 2)


@pytest.fixture
def opened(browser: playwright.Browser, tmp_path: Path) -> Iterator[Opened]:
    entries = [entry(0, 3), entry(1, 3, (8, 8, 3)), entry(2, 3, (64, 40, 3))]
    page = write_gallery(tmp_path, entries, {"ckpt": "digits", "note": "x" * 300}, LABEL)
    view = Opened(browser, page, viewport={"width": 1280, "height": 1000})
    yield view
    assert view.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in view.requests)
    view.context.close()


def centres(shot: bytes) -> np.ndarray:
    """The grey value in the middle of each of a panel's 8 by 8 pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("L"), int)
    rows, columns = (((np.arange(8) + 0.5) * size / 8).astype(int) for size in pixels.shape)
    return pixels[rows[:, None], columns]


def alike(first: bytes, second: bytes) -> bool:
    """Whether two panels show one image; their widths may differ by a part of a pixel."""
    one, other = (
        np.asarray(Image.open(io.BytesIO(shot)).convert("L").resize((64, 64)), np.float32)
        for shot in (first, second)
    )
    return float(np.abs(one - other).mean()) < 8.0


GUIDED = ".card:nth-child(1) .guided .shot"
UNGUIDED = ".card:nth-child(1) .unguided .shot"


def test_everything_loads(opened: Opened) -> None:
    page = opened.page
    assert page.title() == LABEL
    assert page.locator(".card").count() == 3
    assert page.locator("h2").first.inner_text() == LABEL
    assert page.locator("script").count() == 2
    broken = page.evaluate(
        "[...document.images].filter((i) => !(i.complete && i.naturalWidth)).length"
    )
    assert (page.evaluate("document.images.length"), broken) == (3 * (5 + 3), 0)
    assert page.evaluate("getComputedStyle(document.querySelector('.own')).imageRendering") == (
        "pixelated"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_steps(opened: Opened) -> None:
    page = opened.page
    chips = page.locator(".card:nth-child(1) .step")
    clean = opened.look(GUIDED)
    other = opened.look(".card:nth-child(2) .guided .shot")
    seen = [clean]
    for k in range(3):
        chips.nth(k).click()
        assert chips.nth(k).get_attribute("aria-pressed") == "true"
        opened.rest()
        seen.append(opened.look(GUIDED))
    assert len(set(seen)) == 4
    assert opened.look(".card:nth-child(2) .guided .shot") == other
    chips.nth(2).click()
    opened.rest()
    assert opened.look(GUIDED) == clean


def test_chips_work_from_the_keyboard(opened: Opened) -> None:
    clean = opened.look(GUIDED)
    opened.page.locator(".card:nth-child(1) .step").nth(1).focus()
    opened.page.keyboard.press("Enter")
    assert opened.look(GUIDED) != clean


def test_slider_moves_every_card(opened: Opened) -> None:
    page = opened.page
    page.check("input[value=saliency]")
    before = [opened.look(f".card:nth-child({k}) .guided .shot") for k in (1, 2, 3)]
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#reading").inner_text() == "21 of 30, t = 898"
    after = [opened.look(f".card:nth-child({k}) .guided .shot") for k in (1, 2, 3)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_overlays(opened: Opened) -> None:
    page = opened.page
    looks = {}
    for mode in ("none", "saliency", "mask", "difference"):
        page.check(f"input[value={mode}]")
        looks[mode] = opened.look(GUIDED)
    assert len(set(looks.values())) == 4
    pair = entry(0, 3)
    change = np.abs(pair.guided.astype(int) - pair.unguided)[:, :, 0]
    np.testing.assert_allclose(centres(looks["none"]), pair.guided[:, :, 0], atol=2)
    np.testing.assert_allclose(centres(looks["difference"]), np.minimum(255, 4 * change), atol=6)
    page.check("input[value=none]")
    assert opened.look(GUIDED) == looks["none"]


def test_hover_shows_saliency_and_leaving_hides_it(opened: Opened) -> None:
    clean = opened.look(GUIDED)
    opened.page.hover(GUIDED)
    hovered = opened.look(GUIDED)
    opened.rest()
    assert hovered != clean
    assert opened.look(GUIDED) == clean


def test_flip_button_shows_the_twin(opened: Opened) -> None:
    page = opened.page
    guided, unguided = opened.look(GUIDED), opened.look(UNGUIDED)
    assert not alike(guided, unguided)
    page.click(".card:nth-child(1) .flip")
    assert alike(opened.look(GUIDED), unguided)
    assert page.locator(".card:nth-child(1) .guided figcaption").inner_text() == "unguided"
    page.hover(GUIDED)
    opened.rest()
    assert alike(opened.look(GUIDED), unguided)
    page.click(".card:nth-child(1) .flip")
    assert opened.look(GUIDED) == guided


def test_holding_an_image_shows_its_twin(opened: Opened) -> None:
    page = opened.page
    guided, unguided = opened.look(GUIDED), opened.look(UNGUIDED)
    page.hover(GUIDED)
    page.mouse.down()
    assert alike(opened.look(GUIDED), unguided)
    page.mouse.up()
    assert opened.look(GUIDED) == guided
    page.locator(UNGUIDED).focus()
    page.keyboard.down("f")
    assert alike(opened.look(GUIDED), unguided)
    page.keyboard.up("f")
    assert opened.look(GUIDED) == guided


def test_pair_can_be_enlarged_and_linked_to(opened: Opened) -> None:
    page = opened.page
    small = page.locator(GUIDED).bounding_box()
    page.click(".card:nth-child(1) .open")
    playwright.expect(page.locator(".card:visible")).to_have_count(1)
    large = page.locator(GUIDED).bounding_box()
    assert small and large and large["width"] > 1.5 * small["width"]
    assert page.url.endswith("#0")
    page.keyboard.press("Escape")
    # The page answers to the change of its address, a moment after the key.
    playwright.expect(page.locator(".card:visible")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_without_saliency(browser: playwright.Browser, tmp_path: Path, scheme: str) -> None:
    page = write_gallery(tmp_path, [entry(0, 0), entry(1, 0)], {"n": "y" * 500}, "z" * 200)
    view = Opened(browser, page, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert view.page.evaluate("document.documentElement.scrollWidth") == 360
    assert view.page.locator("[value=saliency]").is_hidden()
    assert view.page.locator("#slider").is_hidden()
    dark = (
        view.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 16, 19)"
    )
    assert dark == (scheme == "dark")
    view.page.hover(GUIDED)
    assert view.page.locator(".card").first.get_attribute("data-show") == "none"
    assert view.complaints == []
    view.context.close()
