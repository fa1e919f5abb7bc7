"""Contenders: what a study tries of every guidance method, derived from the methods' classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from sag_dit import guidance
from sag_dit.guidance import CFG, Term
from sag_dit.methods import methods

Terms = tuple[Term, ...]
Objects = Mapping[str, object]
"""What is given to methods that need it, by the name of their field: ``worse``, ``classifier``."""


def setting(kind: type[Term], strength: float, **objects: object) -> Term:
    """Return a method's example so far from off; ``objects`` are such as a worse model.

    Only those are given to a method that it has fields for.
    """
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in objects.items() if name in known}
    return kind(kind.neutral + strength, **{**kind.example, **given})


@dataclass(frozen=True, eq=False)
class Contender:
    """A way to guide, of one strength: ``make`` returns its terms at one of the ``strengths``.

    ``make`` is also told what the user gives, such as a worse model, by name.

    Example::

        contender = next(each for each in contenders(4) if each.name == "SAG")
        contender.make(contender.strengths[0])
    """

    name: str
    kind: type[Term] | None
    strengths: Sequence[float]
    make: Callable[..., Terms]


UNGUIDED = Contender("unguided", None, (0.0,), lambda _strength, **_objects: ())


def strengths(kind: type[Term], count: int) -> list[float]:
    """Return strengths evenly over what a search tries of a method's scale, by their ratios.

    Example:
        >>> strengths(CFG, 3)
        [0.1, 0.63, 4.0]
    """
    tried = kind.searched()["scale"]
    if not (isinstance(tried, tuple) and len(tried) == 2):
        return [float(value) for value in tried]
    low, high = tried
    if count == 1:
        return [float(f"{math.sqrt(low * high):.2g}")]
    ratio = (high / low) ** (1 / (count - 1))
    return [float(f"{low * ratio**place:.2g}") for place in range(count)]


def contenders(count: int) -> list[Contender]:
    """Return every guidance method at ``count`` strengths, CFG first, the others by title."""
    kinds = [getattr(guidance, method.name) for method in methods()]
    kinds.sort(key=lambda kind: (kind is not CFG, kind.title.lower()))
    return [_alone(kind, count) for kind in kinds]


def _alone(kind: type[Term], count: int) -> Contender:
    def make(strength: float, **objects: object) -> Terms:
        return (setting(kind, strength, **objects),)

    return Contender(kind.title, kind, strengths(kind, count), make)


def beside_cfg(contender: Contender, scale: float) -> Contender | None:
    """Return a contender beside CFG of a scale; None for what stands in CFG's place."""
    if contender.kind is None or contender.kind.from_null:
        return None

    def make(strength: float, **objects: object) -> Terms:
        return (CFG(scale), *contender.make(strength, **objects))

    return Contender(f"CFG + {contender.name}", contender.kind, contender.strengths, make)
