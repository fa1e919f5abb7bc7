"""Checking a term's numbers, also those of a method of one's own, by how they are declared."""

from __future__ import annotations

import math


def check_number(name: str, declared: object, value: object, unbounded: bool = False) -> None:
    """Refuse what is no number of a field's declared kind; fields of other kinds pass.

    ``declared`` is a type, or its text in a file of postponed annotations: float, int, bool, or one
    of them or None. A truth value is no number, and ``unbounded`` numbers may be infinite.

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
