"""Numbers of a term are what its fields are declared as, in files of one's own too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any

import pytest

from sag_dit.guidance import CFG, PAG, SAG, SEG, TSG, Autoguidance, BlurGuidance, CFGZero, Term

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAG(True), "scale=True: expected a finite number$"),
        (lambda: SAG(NAN), "scale=nan: expected a finite number$"),
        (lambda: SAG(1.0, blur_sigma=INF), "blur_sigma=inf: expected a finite number"),
        (lambda: SEG(1.0, blur_sigma=NAN), "blur_sigma=nan"),
        (lambda: CFG(2.0, channels=1.5), "channels=1.5: expected a whole number, or null"),
        (lambda: CFG(2.0, channels=True), "channels=True"),
        (lambda: BlurGuidance(1.0, kernel_size=4.5), "kernel_size=4.5: expected a whole number"),
        (lambda: BlurGuidance(1.0, kernel_size=9.0), "kernel_size=9.0: expected a whole number"),
        (lambda: SAG(1.0, heads="4"), "heads='4': expected a whole number, or null"),
        (lambda: SAG(1.0, quantile="a"), "quantile='a': expected a finite number, or null"),
        (lambda: CFGZero(2.0, zero_steps=1.5), "zero_steps=1.5: expected a whole number$"),
        (lambda: TSG(2.0, depth=2.5), "depth=2.5: expected a whole number$"),
        (lambda: TSG(2.0, depth=None), "depth=None: expected a whole number$"),
        (
            lambda: Autoguidance(2.0, ckpt="a", ema="no"),
            "ema='no': expected true, false or a number",
        ),
        (lambda: Autoguidance(2.0, ckpt="a", ema=1), "ema=1: expected true, false or a number"),
        (lambda: PAG(1.0, layers=True), "layers=True: expected the name or number"),
        (lambda: PAG(1.0, layers=[0, 1.5]), r"layers=\[0, 1.5\]: expected the name or number"),
        (lambda: PAG(1.0, layers=[]), r"layers=\[\]: expected the name or number"),
        (lambda: SAG(1.0, layer=()), r"layer=\(\): expected the name or number"),
        (lambda: SAG(1.0, layer=None), "layer=None: expected the name or number"),
        (lambda: SAG(1.0, quantile=0.5, threshold=1.2), "quantile=0.5 beside threshold=1.2"),
    ],
)
def test_a_value_of_another_kind_is_refused(make: Callable[[], Term], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_meant_is_taken() -> None:
    assert SAG(1, threshold=2, layer=[0, "auto"], kernel_size=None).layer == (0, "auto")
    assert SEG(3, blur_sigma=INF).blur_sigma == INF
    assert SAG(1.0, quantile=0.5, threshold=1.0).quantile == 0.5
    # Neither mask nor limit is read then; presets that name a layer go with every mask.
    assert SAG(1.0, mask="global", layer=1, heads=4, quantile=0.5).mask == "global"


@pytest.mark.parametrize(
    ("declared", "good", "bad"),
    [
        (float, (1, 0.5), (None, "1", True, NAN, INF)),
        ("float", (1, 0.5), (None, "1", True, NAN, INF)),
        (int, (3,), (None, 3.0, True)),
        (int | None, (3, None), (3.0, "3")),
        ("float | None", (0.5, None), ("a", False)),
        (bool, (True,), (0, "no", None)),
        (str, ("a", None, 1.5), ()),
        ("int | str", ("a", 1, 1.5), ()),
    ],
)
def test_fields_of_a_method_of_one_s_own_are_checked(
    declared: Any, good: tuple[object, ...], bad: tuple[object, ...]
) -> None:
    """Whether its file postpones annotations, which makes text of them, or does not."""
    power = ("power", declared, field(default=good[0], kw_only=True))
    own = make_dataclass(
        "Own", [power], bases=(Term,), frozen=True, namespace={"contribution": lambda *_: None}
    )
    for value in good:
        assert own(0.5, power=value).power == value  # type: ignore[attr-defined]
    for value in bad:
        with pytest.raises(ValueError, match=rf"power={value!r}: expected"):
            own(0.5, power=value)
