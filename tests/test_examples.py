"""The examples in docstrings of networks, files and denoisers do what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sag_dit"
PARTS = ("models", "checkpoints", "denoiser")
SHOWING = [
    ".".join(("sag_dit", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in [
        *PACKAGE.glob("*.py"),
        *(p for part in PARTS for p in (PACKAGE / part).rglob("*.py")),
    ]
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", SHOWING)
def test_examples_hold(name: str) -> None:
    done = doctest.testmod(import_module(name))
    assert done.attempted > 0 and done.failed == 0
