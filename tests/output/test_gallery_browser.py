"""The gallery in a real browser: opened from disk without a network, clicked, looked at."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sag_dit.output.gallery import About, Pair, write_gallery
from sag_dit.traces import StepView

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
LABEL = "</script><script>document.title = 'taken'</script> <b>\"quoted\", it's</b> 日本"


def entry(index: int, steps: int, size: tuple[int, int, int] = (8, 8, 1)) -> Pair:
    rng = np.random.default_rng(index)
    views = []
    for step in range(steps):
        saliency = rng.gamma(2.0, size=(4, 4)).astype(np.float32)
        saliency /= saliency.mean()
        views.append(StepView(10 * step, 30, 900.0 - step, saliency, saliency > 1, 1.0))
    guided, unguided = rng.integers(0, 256, (2, *size), dtype=np.uint8)
    return Pair(index, index, LABEL, guided, unguided, tuple(views))


def faint(index: int, label: str = "", changes: tuple[int, ...] = (1, 2)) -> Pair:
    """A grey pair without views that differs in its first pixels, and its second twin less."""
    rng = np.random.default_rng(index)
    unguided = rng.integers(60, 120, (8, 8, 1), dtype=np.uint8)
    guided, spared = unguided.copy(), unguided.copy()
    guided[0, : len(changes), 0] += np.array(changes, np.uint8)
    spared[0, 0, 0] += changes[0]
    return Pair(index, index, label, guided, unguided, (), spared)


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
    assert page.locator("#reading").inner_text() == "20 (0 to 29), t = 898"
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
    scaled = change * 255 / change.max()
    np.testing.assert_allclose(centres(looks["difference"]), scaled, atol=6)
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
    playwright.expect(page.locator(".card:nth-child(1) .open")).to_be_focused()


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


@pytest.fixture
def look(browser: playwright.Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open a page of pairs; it may complain of nothing."""
    views: list[Opened] = []

    def opening(entries: list[Pair], about: About | None = None, **options: object) -> Opened:
        page = write_gallery(tmp_path, entries, {"a": 1}, "t", about)
        views.append(Opened(browser, page, **options))
        return views[-1]

    yield opening
    assert [view.complaints for view in views] == [[] for _ in views]
    for view in views:
        view.context.close()


WIDE = {"viewport": {"width": 1280, "height": 900}}
SECOND = About(moves="CFG and SAG moved each image", look="edges", spared="all but SAG")


def test_difference_is_scaled_by_its_own_maximum_and_says_so(look: Callable[..., Opened]) -> None:
    pairs = [faint(0), faint(1, changes=(5, 20, 10)), replace(faint(2), guided=faint(2).unguided)]
    view = look([replace(each, spared=None) for each in pairs], **WIDE)
    view.page.check("input[value=difference]")
    captions = view.page.locator(".guided figcaption").all_inner_texts()
    for number, pair in enumerate(pairs[:2], start=1):
        change = pair.change()[:, :, 0]
        shown = centres(view.look(f".card:nth-child({number}) .guided .shot"))
        np.testing.assert_allclose(shown, change * 255 / change.max(), atol=6)
        assert captions[number - 1].endswith(f"white is its maximum, {change.max()} of 255")
    assert captions[2] == "difference to unguided: none"


def test_three_columns_and_a_choice_of_the_twin(look: Callable[..., Opened]) -> None:
    pair = faint(3, changes=(40, 90))
    view = look([pair], SECOND, **WIDE)
    page = view.page
    assert page.locator("figcaption").all_inner_texts() == ["unguided", "all but SAG", "all"]
    seen = [centres(view.look(f".{name} .shot")) for name in ("unguided", "spared", "guided")]
    for shown, image in zip(seen, pair.images.values(), strict=True):
        np.testing.assert_allclose(shown, image[:, :, 0], atol=2)
    page.click(".flip")
    np.testing.assert_allclose(centres(view.look(".guided .shot")), seen[1], atol=2)
    page.select_option("#twins select", "unguided")
    np.testing.assert_allclose(centres(view.look(".guided .shot")), seen[0], atol=2)
    assert page.locator(".guided figcaption").inner_text() == "unguided"
    page.click(".flip")
    page.check("input[value=difference]")
    change = pair.change()[:, :, 0] * 255 / 90
    np.testing.assert_allclose(centres(view.look(".guided .shot")), change, atol=6)


def test_enlarged_pairs_are_gone_through_by_keys_and_buttons(look: Callable[..., Opened]) -> None:
    view = look([faint(index, "ab"[index % 2]) for index in range(5)], SECOND, **WIDE)
    page, shown = view.page, view.page.locator(".card .id")

    def expect(index: int) -> None:
        # A list: one text would fail at once while there are still several cards, as there are
        # until the page answers to the change of its address, a moment after the key.
        playwright.expect(shown).to_have_text([f"#{index}  ·  seed {index}"])

    playwright.expect(shown).to_have_count(5)
    page.keyboard.press("n")
    expect(0)
    assert page.locator("#previous").is_disabled()
    for key, index in (("n", 1), ("n", 2), ("p", 1)):
        page.keyboard.press(key)
        expect(index)
    page.click("#next")
    expect(2)
    page.keyboard.press("Escape")
    playwright.expect(shown).to_have_count(5)
    # Within a class alone, if one is chosen.
    page.select_option("#classes select", label="b")
    playwright.expect(shown).to_have_count(2)
    page.keyboard.press("n")
    expect(1)
    page.keyboard.press("n")
    expect(3)
    assert page.locator("#next").is_disabled() and page.locator("#place").inner_text() == "2 of 2"
    page.go_back()
    playwright.expect(shown).to_have_count(2)
    page.evaluate("location.hash = '#4'")  # Of the other class.
    expect(4)


def test_more_than_a_hundred_pairs_have_pages(look: Callable[..., Opened]) -> None:
    view = look([faint(index, str(index % 3)) for index in range(230)], SECOND, **WIDE)
    page, shown = view.page, view.page.locator(".card")
    back, on = page.locator("#pages button").all()
    assert shown.count() == 100 and page.locator("#pages span").inner_text() == "1 to 100 of 230"
    assert back.is_disabled()
    on.click()
    on.click()
    assert shown.count() == 30 and on.is_disabled()
    assert page.locator(".id").first.inner_text().startswith("#200")
    page.select_option("#classes select", label="1")
    assert shown.count() == 77 and page.locator("#pages").is_hidden()
    page.select_option("#classes select", label="all 3")
    page.evaluate("location.hash = '#150'")
    playwright.expect(shown).to_have_count(1)
    page.keyboard.press("Escape")
    playwright.expect(shown).to_have_count(100)
    assert page.locator("#pages span").inner_text() == "101 to 200 of 230"


def test_command_and_python_are_copied(look: Callable[..., Opened]) -> None:
    about = replace(SECOND, command="python sample.py 'a=[1]'", python="import sag_dit\n# <b>")
    view = look([faint(0)], about, **WIDE)
    view.page.click("summary")
    for name, text in (("command", about.command), ("python", about.python)):
        assert view.page.locator(f"#{name} pre").inner_text() == text
        view.page.click(f"#{name} button")
        assert view.page.evaluate("getSelection().toString()") == text
        playwright.expect(view.page.locator(f"#{name} button")).to_have_text("Copied")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark"), (400, "light")])
def test_legend_is_on_one_line_and_keys_are_listed(
    look: Callable[..., Opened], width: int, scheme: str
) -> None:
    pairs = [replace(entry(index, 3), spared=entry(index, 0).unguided) for index in range(2)]
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page = look(pairs, SECOND, **options).page
    tops = page.locator(".legend > *").evaluate_all(
        "nodes => nodes.map((node) => { const r = node.getBoundingClientRect();"
        " return [(r.top + r.bottom) / 2, r.left, r.right]; })"
    )
    middles, lefts, rights = zip(*tops, strict=True)
    assert len(tops) == 4 and max(middles) - min(middles) < 2
    assert min(lefts) >= 0 and max(rights) <= width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("footer kbd").all_inner_texts() == [*"F←→14NP", "Esc"]


def test_views_are_chosen_by_number(look: Callable[..., Opened]) -> None:
    page = look([entry(0, 3)], **WIDE).page
    for key, mode in (("2", "saliency"), ("4", "difference"), ("1", "none"), ("3", "mask")):
        page.keyboard.press(key)
        assert page.locator("[name=mode]:checked").get_attribute("value") == mode
    page.keyboard.press("ArrowRight")
    assert page.locator("#reading").inner_text().startswith("20 ")


def test_the_most_changed_pair_is_a_link(look: Callable[..., Opened]) -> None:
    view = look([faint(0), faint(1, changes=(120, 90)), faint(2)], SECOND, **WIDE)
    view.page.click("#lead a")
    playwright.expect(view.page.locator(".card .id")).to_have_text(["#1  ·  seed 1"])


def test_pairs_are_enlarged_within_a_notebook(browser: playwright.Browser, tmp_path: Path) -> None:
    page = write_gallery(tmp_path, [faint(index) for index in range(4)], {"a": 1}, "t", SECOND)
    notebook = tmp_path / "notebook.html"
    within = html.escape(page.read_text(encoding="utf-8"))
    notebook.write_text(f'<iframe srcdoc="{within}" width=1000 height=600></iframe>', "utf-8")
    view = Opened(browser, notebook, **WIDE)
    inner = view.page.frame_locator("iframe")
    inner.locator(".open").nth(1).click()
    for button, index in (("#next", 2), ("#next", 3), ("#previous", 2)):
        inner.locator(button).click()
        playwright.expect(inner.locator(".card .id")).to_have_text([f"#{index}  ·  seed {index}"])
    inner.locator("#all").click()
    playwright.expect(inner.locator(".card")).to_have_count(4)
    inner.locator("#lead a").click()
    playwright.expect(inner.locator(".card")).to_have_count(1)
    assert view.page.url == notebook.as_uri() and view.complaints == []
    view.context.close()
