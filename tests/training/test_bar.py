"""The bar of a set shows what the set is called, whatever that is."""

from __future__ import annotations

import pytest

from sag_dit.training.predicting import Bar


@pytest.mark.parametrize("text", ["photos [v1] (1 of 1)", "x[/y]", "[bold]a", r"a\[b]"])
def test_a_set_s_name_is_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.begin(text, total=3)
    bar.begin_batch(3)
    bar.end_batch()
    bar.stop()
    assert capsys.readouterr().err.startswith(f"{text} ")
