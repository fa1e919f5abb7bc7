"""What ``_target_`` names is made of values that its annotations allow, or the key is told."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import pytest

from sag_dit.cli.composing import fitted, make
from sag_dit.guidance import SAG, Term


@dataclass
class Part:
    """Something of the user's own with one argument of each kind."""

    width: int = 1
    share: float = 0.5
    size: tuple[int, int] = (1, 1)
    names: list[str] | None = None
    kind: Literal["a", 2] = "a"
    inside: Fraction | None = None
    limit: int | float = 1.0

    def __post_init__(self) -> None:
        if self.width > 9:
            raise ValueError(f"width={self.width}: expected at most 9")


PART = f"{__name__}.Part"


def part(**values: Any) -> Any:
    return make({"_target_": PART, **values}, "mine")


def test_whole_floats_become_whole_numbers_in_lists_as_well() -> None:
    made = part(width=3.0, size=[8.0, 2], limit=1.0)
    assert (made.width, list(made.size), made.limit) == (3, [8, 2], 1.0)
    numbers = (made.width, *made.size, made.limit)
    assert [type(each) for each in numbers] == [int, int, int, float]
    blur = fitted({"kernel_size": 9.0}, "guidance.sag", ["sag_dit.guidance.SAG"])
    assert type(blur["kernel_size"]) is int


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"width": "abc"}, "mine.width=abc: expected a whole number"),
        ({"width": 1.5}, "mine.width=1.5: expected a whole number"),
        ({"width": True}, "mine.width=true: expected a whole number"),
        ({"width": None}, "mine.width=null: expected a whole number"),
        ({"share": float("nan")}, "mine.share=nan: expected a number"),
        ({"size": [1]}, "mine.size=[1]: expected a list of 2 whole numbers"),
        ({"names": "ab"}, "mine.names=ab: expected a list of names, or null"),
        ({"kind": "b"}, "mine.kind=b: expected one of a, 2"),
        ({"width": 10}, "mine.width=10: expected at most 9"),
        ({"wdith": 3}, f"mine.wdith: {PART} takes no wdith\nDid you mean width?"),
        ({"inside": {"_target_": "fractions.Fractoin"}}, "mine.inside._target_=fractions.Fractoin"),
        ({"_target_": ""}, "mine._target_=: expected the name of a class"),
        ({"_target_": None}, "mine._target_=null: expected the name of a class"),
        ({"_target_": "no_such.Part"}, "mine._target_=no_such.Part: there is no module no_such"),
    ],
)
def test_the_key_is_told_with_what_was_expected(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        part(**values)
    assert str(error.value).startswith(told)


def test_a_mapping_without_target_is_told() -> None:
    with pytest.raises(ValueError, match=r"^mine: expected the name of a class as _target_$"):
        make({"width": 3}, "mine")


def test_parts_within_are_made_and_infinite_numbers_are_numbers() -> None:
    made = part(inside={"_target_": "fractions.Fraction", "numerator": 3}, share=float("inf"))
    assert made.inside == 3 and made.share == float("inf")
    later = part(_partial_=True, width=2)
    assert isinstance(later, partial) and later(share=1.0) == Part(2, 1.0)


def test_what_is_made_has_to_be_of_a_kind() -> None:
    assert isinstance(make({"_target_": "sag_dit.guidance.SAG"}, "guidance.sag", Term), SAG)
    for target in (PART, "os.getcwd"):
        with pytest.raises(
            ValueError, match=r"mine: .* makes a .*; expected a subclass of sag_dit"
        ):
            make({"_target_": target}, "mine", Term)
    with pytest.raises(ValueError, match=r"mine: .* makes a Part; expected a subclass of sag_dit"):
        make({"_target_": PART, "_partial_": True}, "mine", Term)


def test_what_the_command_sets_is_refused_and_lists_are_joined() -> None:
    with pytest.raises(ValueError, match=r"^mine.share=0.5: .*; leave it out$"):
        make({"_target_": PART, "share": 0.5}, "mine", share=0.1)
    assert make({"_target_": PART, "names": ["a"]}, "mine", names=["b"]).names == ["a", "b"]


def test_texts_that_look_like_interpolations_stay() -> None:
    assert part(names=["${HOME}"]).names == ["${HOME}"]


LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


def returns_nothing(*_: Any) -> None:
    """Stands for a hook of a user's."""


HOOK = f"{__name__}.returns_nothing"
STATED = f"{{_target_: {HOOK}, _partial_: true}}"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (HOOK, f"={HOOK}: expected a function, stated as {{_target_: my_module.its_name, _partial"),
        (3, "=3: expected a function, stated as "),
        (["a"], "=[a]: expected a function, stated as "),
        ({"_target_": HOOK}, "takes a function here: this calls it, and passes on the NoneType"),
        ({"_target_": HOOK}, f"that it returns; expected {STATED}"),
        ({"name": HOOK}, f": {LAMBDA} takes a function here; expected {{_target_: my_module."),
    ],
)
def test_what_is_no_function_is_refused_where_one_is_taken(value: Any, told: str) -> None:
    with pytest.raises(ValueError) as error:
        make({"_target_": LAMBDA, "on_train_end": value}, "mine")
    assert str(error.value).startswith("mine.on_train_end=") and told in str(error.value)


def test_a_function_is_taken_where_one_is() -> None:
    hook = {"_target_": HOOK, "_partial_": True}
    made = make({"_target_": LAMBDA, "on_train_end": hook, "on_fit_end": None}, "mine")
    assert made.on_train_end.func is returns_nothing
    of_class = make({"_target_": LAMBDA, "on_train_end": {"_target_": "torch.nn.ReLU"}}, "mine")
    assert callable(of_class.on_train_end)
