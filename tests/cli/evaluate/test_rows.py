"""The names of rows: guidance as one reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sag_dit.study.measurement import guidance_text

Evaluate = Callable[..., Any]


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ({"scale": 1.5}, "CFG 1.5"),
        ({"scale": 2.0, "channels": 3}, "CFG 2 on 3 channels"),
        ({"scale": 1.5, "interval": [0.0, 1.0]}, "CFG 1.5"),
        ({"scale": 1.5, "interval": [0.0, 0.5]}, "CFG 1.5 from 0 to 0.5"),
        ({"scale": 1.5, "interval": [0.28, 2.9], "interval_in": "sigma"},
         "CFG 1.5 from 0.28 to 2.9 in sigma"),
        ({"scale": 1.5, "interval": [None, 2.9], "interval_in": "sigma"},
         "CFG 1.5 up to 2.9 in sigma"),
        ({"scale": 1.5, "interval": [300, None], "interval_in": "t"}, "CFG 1.5 from 300 in t"),
        ({"scale": 1.5, "interval": [0.0, 1.0], "interval_in": "t"}, "CFG 1.5 from 0 to 1 in t"),
        ({"scale": 1.5, "interval": [None, None], "interval_in": "t"}, "CFG 1.5"),
    ],
)  # fmt: skip
def test_a_term_says_where_it_acts(term: dict[str, Any], text: str) -> None:
    assert guidance_text({"cfg": term, "blur": {"scale": 0.3}}) == f"{text} + blur 0.3"


def test_an_open_interval_is_measured(draw: Evaluate) -> None:
    interval = ("guidance.cfg.interval=[null,2.9]", "guidance.cfg.interval_in=sigma")
    outcome = draw("cfg_scale=1.5", *interval, "metrics=[fid]", "confidence.repeats=0")
    (result,) = outcome.results
    assert result["name"] == result["facts"]["guidance"] == "CFG 1.5 up to 2.9 in sigma"
