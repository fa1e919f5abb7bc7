"""Checking the numbers of a term by the types of its fields, also in a user's own method."""

from __future__ import annotations

import math


def check_number(name: str, declared: object, value: object, unbounded: bool = False) -> None:
    """Refuse a value that is not of the kind that its field declares, if that is a number or bool.

    ``declared`` is the type or its name: float, int or bool, or one of them and None. Other fields
    are not checked. True and False are no numbers here. ``unbounded`` numbers may be infinite.

    Raises:
        ValueError: the field, its value and what was expected.
    """
    text = declared.__name__ if isinstance(declared, type) else str(declared)
    kind, _, other = text.partition(" | ")
    if kind not in EXPECTED or other not in ("", "None") or (other and value is None):
        return
    if isinstance(value, bool):
        meant = kind == "bool"
    elif isinstance(value, int):
        meant = kind != "bool"
    else:
        finite = isinstance(value, float) and (
            math.isfinite(value) or (unbounded and math.isinf(value))
        )
        meant = kind == "float" and finite
    if not meant:
        optional = ", or null" if other else ""
        raise ValueError(f"{name}={value!r}: expected {EXPECTED[kind]}{optional}")


EXPECTED = {"float": "a finite number", "int": "a whole number", "bool": "true or false"}
