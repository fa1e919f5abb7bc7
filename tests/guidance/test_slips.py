"""Slips in a method of one's own end in a sentence that names the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import sag_dit
from sag_dit.guidance import Term


@dataclass(frozen=True)
class NoQuestion(Term):
    """Returns at once."""

    def contribution(self, ask: Any) -> Any:
        """Return the noisy image."""
        return ask.base.x_t


@dataclass(frozen=True)
class NoTuple(Term):
    """Asks one branch as it is."""

    def contribution(self, ask: Any) -> Any:
        """Ask without a tuple."""
        (base,) = yield ask.base
        return base.v


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (NoQuestion(1.0), r"NoQuestion.contribution returned a Tensor: expected a generator"),
        (NoTuple(1.0), r"NoTuple.contribution asked a Branch: expected a tuple of branches"),
    ],
)
def test_a_slip_is_named(term: Term, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sag_dit.sample(sag_dit.load("digits"), [1], guidance=[term], steps=1)
