"""The studio in a real browser: sliders moved, commands copied, two users, nothing from outside."""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from sag_dit.output.folder import read_png
from tests.cli.conftest import ROOT

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[studio]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytestmark = pytest.mark.slow
READY = ".stage[data-running=false]"
PATIENCE = 60_000


@dataclass
class Studio:
    """A studio that runs as a user starts it."""

    address: str
    process: subprocess.Popen[str]
    folder: Path


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "outputs").mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sag_dit",
            "studio",
            "ckpt=digits",
            "port=null",
            "steps=4",
            "images=2",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
        found = re.match(r"studio: (http://127\.0\.0\.1:\d+/)", line)
        try:
            assert found, line
            yield Studio(found[1], process, folder)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
    assert code == 130


@dataclass
class User:
    """One open page, what it complained about and what it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def shots(self) -> list[str]:
        """The guided pictures, as they stand in the page."""
        found: list[str] = self.page.eval_on_selector_all(
            ".stage .guided img.own", "all => all.map((each) => each.src)"
        )
        return found

    def twins(self) -> list[str]:
        found: list[str] = self.page.eval_on_selector_all(
            ".stage .unguided img", "all => all.map((each) => each.src)"
        )
        return found

    def words(self) -> str:
        said: str = self.page.locator(".stage .words").inner_text()
        return said

    def type(self, place: str, value: object) -> None:
        """Type a number beside a slider, and leave it."""
        box = self.page.locator(f"#{place} input[type=number]")
        box.fill(str(value))
        box.press("Enter")
        box.blur()

    def until(self, words: str) -> None:
        """Wait until the pictures are of settings that are told so, and finished."""
        playwright.expect(self.page.locator(f"{READY} .words")).to_have_text(
            re.compile(words), timeout=PATIENCE
        )


@pytest.fixture
def user(browser: playwright.Browser, studio: Studio) -> Iterator[User]:
    made = enter(browser, studio)
    yield made
    made.page.context.close()
    assert made.complaints == []
    strangers = [url for url in made.requests if not url.startswith((studio.address, "data:"))]
    assert strangers == []


def enter(browser: playwright.Browser, studio: Studio) -> User:
    """Open the page as a new user."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    user = User(context.new_page())
    user.page.on("console", lambda message: user.complaints.append(message.text))
    user.page.on("pageerror", lambda error: user.complaints.append(str(error)))
    user.page.on("request", lambda request: user.requests.append(request.url))
    user.page.goto(studio.address)
    user.page.wait_for_selector(READY, timeout=PATIENCE)
    return user


def test_a_slider_changes_the_pictures_and_not_the_twins(user: User) -> None:
    before, twins = user.shots(), user.twins()
    assert len(before) == len(twins) == 2 and user.words().startswith("SAG 0.3")
    # By keyboard alone: the arrow moves the slider by its step.
    slider = user.page.locator("#sag-scale input[type=range]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    user.until("^SAG 0.45")
    assert user.shots() != before and user.twins() == twins
    user.type("cfg-scale", 3)
    user.until("beside CFG 3")
    user.type("seed", 4)
    playwright.expect(user.page.locator("#text-command")).to_contain_text("seed=4")
    gone = "twin => document.querySelector('.stage .unguided img').src !== twin"
    user.page.wait_for_function(gone, arg=twins[0], timeout=PATIENCE)


def test_what_is_copied_draws_the_same_images(user: User, tmp_path: Path) -> None:
    user.type("sag-scale", 1.5)
    user.until("^SAG 1.5")
    shots = user.shots()
    user.page.locator("#copy-command").click()
    command = user.page.evaluate("navigator.clipboard.readText()")
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "sample.py")
    more = [f"out={tmp_path / 'drawn'}", "trainer.accelerator=cpu", "trainer.devices=1"]
    subprocess.run([sys.executable, script, *arguments, *more], cwd=ROOT, check=True)
    files = sorted((tmp_path / "drawn" / "images").rglob("*.png"))
    user.page.locator("#copy-python").click()
    code = user.page.evaluate("navigator.clipboard.readText()")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert len(files) == len(shots) == 2
    for file, shot, image in zip(files, shots, scope["out"].tensor, strict=True):
        shown = tmp_path / "shown.png"
        shown.write_bytes(base64.b64decode(shot.partition(",")[2]))
        assert np.array_equal(read_png(shown), read_png(file))
        assert np.array_equal(read_png(shown), image.permute(1, 2, 0).numpy())
    user.page.locator("#copy-yaml").click()
    assert "sag_scale: 1.5" in user.page.evaluate("navigator.clipboard.readText()")


def test_two_users_see_their_own(user: User, browser: playwright.Browser, studio: Studio) -> None:
    other = enter(browser, studio)
    user.type("sag-scale", 2)
    other.type("sag-scale", 4)
    user.until("^SAG 2 ")
    other.until("^SAG 4 ")
    mine, theirs = user.shots(), other.shots()
    assert mine != theirs and user.twins() == other.twins()
    user.type("sag-scale", 4)
    user.until("^SAG 4 ")
    assert user.shots() == theirs == other.shots()
    other.page.context.close()


def test_settings_that_cannot_work_are_explained_in_place(user: User) -> None:
    before = user.shots()
    user.type("auto-scale", 2)
    told = user.page.locator("#note-auto .problem")
    playwright.expect(told).to_contain_text("needs a worse model", timeout=PATIENCE)
    playwright.expect(user.page.locator("#problem .problem")).to_be_visible()
    assert user.shots() == before
    user.type("auto-scale", 1)
    playwright.expect(user.page.locator(".problem")).to_have_count(0, timeout=PATIENCE)


def test_a_drawing_is_seen_while_it_is_drawn_and_can_be_stopped(user: User) -> None:
    user.type("count", 8)
    user.type("steps", 100)
    user.page.wait_for_selector(".stage.count-8[data-running=true]", timeout=PATIENCE)
    user.page.locator("body").press("s")
    user.page.wait_for_timeout(1500)
    stage = user.page.locator(".stage")
    step = int(stage.get_attribute("data-step"))
    assert 0 < step < 100
    user.page.wait_for_timeout(1500)
    assert int(stage.get_attribute("data-step")) == step
    user.type("steps", 3)
    user.page.wait_for_selector(f"{READY}[data-step='3']", timeout=PATIENCE)


def test_attention_lies_over_the_picture_of_a_step(user: User) -> None:
    user.page.get_by_label("saliency").check()
    seen = user.page.locator(".stage img.heat")
    playwright.expect(seen).to_have_count(2)
    last = seen.first.get_attribute("src")
    user.type("step", 2)
    playwright.expect(user.page.locator(".stage[data-step='2']")).to_be_visible()
    assert seen.first.get_attribute("src") != last
    user.page.get_by_label("mask").check()
    playwright.expect(user.page.locator(".stage img.veil")).to_have_count(2)


def test_a_is_kept_and_swapped_and_gone_back_to(user: User) -> None:
    first = user.shots()
    shown = "[...document.querySelectorAll('.stage .guided img.other')].map((i) => [i.src, " \
        "getComputedStyle(i).display])"  # fmt: skip
    assert [display for _, display in user.page.evaluate(shown)] == ["none", "none"]
    user.page.locator("body").press("x")
    assert user.page.evaluate(shown) == [[twin, "block"] for twin in user.twins()]
    user.page.locator("body").press("x")
    user.page.locator("body").press("a")
    user.page.wait_for_selector(f"{READY} b.other:has-text('A, kept')", state="attached")
    user.type("sag-scale", 3)
    user.until("^SAG 3 ")
    assert [src for src, _ in user.page.evaluate(shown)] == first != user.shots()
    user.page.locator("body").press("b")
    user.until("^SAG 0.3")
    assert user.shots() == first


def test_a_strip_and_a_grid(user: User) -> None:
    user.page.get_by_role("tab", name="Strip and grid").click()
    user.page.locator("#grid-xs textarea, #grid-xs input").fill("0, 3")
    user.page.locator("#grid-draw").click()
    user.page.wait_for_selector(".grid[data-running=false]", timeout=PATIENCE)
    shown = user.page.eval_on_selector_all(".grid img", "all => all.map((each) => each.src)")
    assert len(shown) == 3 and shown[0] == shown[1] != shown[2]


def test_no_file_is_served_and_nobody_else_is_asked(user: User, studio: Studio) -> None:
    secret = studio.folder / "secret.txt"
    secret.write_text("secret")
    inside = studio.folder / "outputs" / "config.yaml"
    inside.write_text("ckpt: digits")
    tried = [
        f"gradio_api/file={path}"
        for path in (secret, "/etc/passwd", "configs/../secret.txt", inside)
    ]
    for path in [*tried, "gradio_api/proxy=https://huggingface.co/", "gradio_api/file/etc/passwd",
                 "static/../../../secret.txt", "gradio_api/vibe-code/"]:  # fmt: skip
        answer = httpx.get(f"{studio.address}{path}")
        assert answer.status_code >= 400 and "secret" not in answer.text, path
    assert httpx.get(studio.address, headers={"host": "elsewhere.example"}).status_code == 403
    files = {"files": ("page.html", b"<script>")}
    assert httpx.post(f"{studio.address}gradio_api/upload", files=files).status_code == 415
    # A path that the list does not offer, as a request of one's own could name it.
    user.page.locator("#ckpt input").fill(str(secret))
    user.page.locator("#ckpt input").press("Enter")
    told = user.page.locator("#problem .problem")
    playwright.expect(told).to_contain_text("outside of the studio's folders", timeout=PATIENCE)
    # The server has talked to this machine alone.
    processes = [psutil.Process(studio.process.pid)]
    processes += processes[0].children(recursive=True)
    ends = {
        end.ip
        for each in processes
        for connection in each.net_connections("inet")
        for end in (connection.laddr, connection.raddr)
        if end
    }
    assert ends == {"127.0.0.1"}


def test_going_past_the_controls_by_keyboard_changes_nothing(user: User) -> None:
    user.type("sag-scale", 3)
    user.until("^SAG 3 ")
    command = user.page.locator("#text-command").text_content()
    order = ["ckpt", "upload", "label", "seed", "count", "steps", "sampler", "sampler-eta"]
    held = "(order) => order.find((id) => document.getElementById(id).contains(" \
        "document.activeElement))"  # fmt: skip
    user.page.locator("#ckpt input").focus()
    passed = []
    for _ in range(12):
        passed.append(user.page.evaluate(held, order))
        user.page.keyboard.press("Tab")
    assert [each for each in dict.fromkeys(passed) if each] == order
    # Back again too, and past the lists below the pictures, whose values were typed.
    for _ in passed:
        user.page.keyboard.press("Shift+Tab")
    user.page.get_by_role("tab", name="Strip and grid").click()
    typed = user.page.locator("#grid-xs textarea, #grid-xs input")
    typed.fill("0, 3")
    user.page.keyboard.press("Shift+Tab")
    user.page.keyboard.press("Shift+Tab")
    user.page.get_by_role("tab", name="Open").click()
    user.page.locator("#folder input").focus()
    user.page.keyboard.press("Tab")
    user.page.wait_for_timeout(1500)
    assert user.page.locator("#text-command").text_content() == command
    assert user.words().startswith("SAG 3 ") and typed.input_value() == "0, 3"
    assert user.page.locator(".problem").count() == 0


def test_an_emptied_field_is_explained(user: User) -> None:
    for place in ("steps", "seed"):
        box = user.page.locator(f"#{place} input[type=number]")
        value = box.input_value()
        user.type(place, "")
        told = user.page.locator("#problem .problem")
        playwright.expect(told).to_contain_text(f"{place}: ", timeout=PATIENCE)
        assert len(user.shots()) == 2
        user.type(place, value)
        playwright.expect(told).to_have_count(0, timeout=PATIENCE)


def test_pictures_stay_in_view_on_a_phone(browser: playwright.Browser, studio: Studio) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(studio.address)
    page.wait_for_selector(READY, timeout=PATIENCE)
    page.evaluate("scrollTo(0, 900)")
    page.wait_for_function("document.querySelector('#stage').getBoundingClientRect().top <= 0")
    # What is at the middle of a picture is the picture, whatever is scrolled below it.
    assert page.eval_on_selector_all(
        "#stage .shot img.own",
        "all => all.every((each) => { const r = each.getBoundingClientRect(); return each.closest("
        "'.shot').contains(document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2)); })",
    )
    heights = page.eval_on_selector_all(
        "#buttons button", "all => all.map((each) => each.getBoundingClientRect().top)"
    )
    assert len(heights) == 4 and max(heights) - min(heights) < 2
    context.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window(browser: playwright.Browser, studio: Studio, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
    page = context.new_page()
    page.goto(studio.address)
    page.wait_for_selector(READY, timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sizes = page.eval_on_selector_all(
        "#controls .block", "all => all.map((each) => [each.scrollHeight, each.clientHeight])"
    )
    assert all(inner <= outer + 2 for inner, outer in sizes)
    context.close()
