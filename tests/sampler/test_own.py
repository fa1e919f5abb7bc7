"""Samplers of one's own: their identity tells two of one name apart, and what is none is told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sag_dit.sampler import DDIM, Sampler


class Euler(DDIM):
    """Another file's class of the same name."""


def test_a_sampler_without_a_key_is_told_by_its_place() -> None:
    there = dataclass(frozen=True)(Euler)
    here = dataclass(frozen=True)(type("Euler", (DDIM,), {"__module__": "another_file"}))
    names = [there(0.0).identity()["name"], here(0.0).identity()["name"]]
    assert names == [f"{__name__}.Euler", "another_file.Euler"]


def test_options_that_cannot_be_told_are_refused() -> None:
    class Bare(Sampler):
        def steps(self, *_: object) -> None:  # type: ignore[override]
            """Draw nothing."""

    with pytest.raises(ValueError, match=r"Bare is no dataclass: write @dataclass\(frozen=True\)"):
        Bare().identity()
