"""docs/extending.md: its files are written and its commands are run, as a reader would."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import sag_dit
from sag_dit.study import compare
from tests.pages import Page, run

PAGE = Page.of("extending.md")
QUICK = ("trainer.accelerator=cpu", "trainer.devices=1")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    PAGE.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("commands", PAGE.blocks, ids=["sampler", "metric", "data", "method"])
def test_its_commands_run(commands: list[str], files: Path) -> None:
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        told = run([*arguments, *QUICK], files)
        assert "evaluate" not in arguments or "brightness" in told


def test_its_classes_are_used_from_python(files: Path) -> None:
    import my_history  # type: ignore[import-not-found]
    import my_metric  # type: ignore[import-not-found]
    import my_sampler  # type: ignore[import-not-found]

    model = sag_dit.load("digits")
    drawn = sag_dit.sample(model, [3, 7], sampler=my_sampler.Euler(), steps=3)
    assert drawn.shape == (2, 1, 8, 8)
    plain, steady = (
        sag_dit.sample(model, [3, 7], guidance=guidance, steps=3)
        for guidance in ([], [my_history.Steady(0.5)])
    )
    assert (plain != steady).any()
    found = compare(
        model,
        {"none": []},
        features=my_metric.Pixels(),
        reference="digits:report",
        metrics=["my_metric.BRIGHTNESS"],
        num_images=20,
        steps=3,
    )
    brightness = found["none"].metrics["my_metric.BRIGHTNESS"]
    assert 0 < brightness < 1
    # Neither direction is the better one.
    assert "brightness" in str(found) and "brightness ↑" not in str(found)
