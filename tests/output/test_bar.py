"""The bar of a set: what it is called, and how long the rest takes where nothing moves."""

from __future__ import annotations

import pytest

from sag_dit.output import bar as module
from sag_dit.output.bar import Bar


@pytest.mark.parametrize("text", ["photos [v1] (1 of 1)", "x[/y]", "[bold]a", r"a\[b]"])
def test_a_set_s_name_is_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.begin(text, total=3)
    bar.begin_batch(3)
    bar.end_batch()
    bar.stop()
    assert capsys.readouterr().err.startswith(f"{text} ")


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("usual", "total", "told"),
    [
        ((True, True, True), 400, ["set: about 3 min left"]),
        # Twins make the first batches longer.
        ((False, False, True), 400, ["set: about 3 min left"]),
        ((True, True, True), 16, []),
    ],
)
def test_the_time_left_is_told_once(
    usual: tuple[bool, ...],
    total: int,
    told: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    bar = Bar()
    bar.begin("set", total=total)
    for each in usual:
        bar.begin_batch(4, each)
        clock.now += 2 if each else 20
        bar.end_batch()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "left" in line] == told
    bar.stop()
