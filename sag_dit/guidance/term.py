"""Branch, Question and Term: how a guidance method asks and what it returns.

A method is written as a generator that reads as its paper: ask, compute, ask, return. It yields
tuples of branches and receives one prediction for each; it returns its whole contribution to v at
the x_t of the base, its scale applied. The runner in ``guided.py`` steps all methods in lockstep.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from sag_dit.attention import CaptureKind, Edit
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.tensors import Images

BranchName = Literal["auto", "cond", "null"]


@dataclass(frozen=True, eq=False)
class Branch:
    """An immutable question to a denoiser: which model, which x, which condition, which edits.

    What is captured on the way (layer name -> "saliency" or "map") does not change the answer and
    so is no part of the question's identity: two branches that differ only there are asked once.
    """

    model: Denoiser
    x_t: Images
    cond: Condition
    edits: tuple[Edit, ...] = ()
    captures: tuple[tuple[str, CaptureKind], ...] = ()

    @property
    def key(self) -> tuple[int, int, int, tuple[Edit, ...]]:
        """Its identity within one step: tensors are compared as objects, edits by value."""
        return (id(self.model), id(self.x_t), id(self.cond), self.edits)

    def capturing(self, layer: str, kind: CaptureKind = "saliency") -> Branch:
        """Return the same question that also reads ``layer``'s attention.

        The prediction's ``attention`` then holds it under :func:`capture_key` of the full name.
        """
        return replace(self, captures=(*self.captures, (self.model.layer(layer).name, kind)))

    def edited(self, *edits: Edit) -> Branch:
        """Return the question with further edits."""
        return replace(self, edits=(*self.edits, *edits))


@dataclass(frozen=True, eq=False)
class Question:
    """What a term is told at one evaluation.

    ``base`` is the given condition, ``null`` the null condition of the same model (None if it knows
    none). ``guided_by_cfg`` says whether classifier-free guidance is active at this step.
    ``memory`` is the term's own store for one run; it starts empty. ``noise`` is the images' own
    randomness, for terms that draw.
    """

    step: Step
    base: Branch
    null: Branch | None
    guided_by_cfg: bool = False
    noise: NoiseSource | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def branch(self, name: BranchName) -> Branch:
        """Return the branch a perturbation degrades: ``auto`` is null beside CFG, else the base.

        Raises:
            ValueError: the null branch is asked of a model that has none.
        """
        if name == "cond" or (name == "auto" and not self.guided_by_cfg):
            return self.base
        return self.required_null()

    def required_null(self) -> Branch:
        """Return the null branch.

        Raises:
            ValueError: the model was trained without label dropout.
        """
        if self.null is None:
            raise ValueError(
                "this model has no null condition (it was trained without label dropout), so "
                "classifier-free guidance and branch='null' cannot be used; set cfg_scale=1"
            )
        return self.null


Asking: TypeAlias = Generator[tuple[Branch, ...], tuple[Prediction, ...], Tensor]
"""Yields branches, receives their predictions, returns a contribution to v."""


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One guidance method.

    ``interval`` is the half-open share [start, stop) of the run in which it acts, 0 being pure
    noise. A term that is off or outside its interval never starts and costs nothing.

    Raises:
        ValueError: the interval is not within [0, 1] or is empty the wrong way round.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    from_null: ClassVar[bool] = False
    """Whether the term guides away from the null condition, as CFG does: see Question.branch."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if each.type == "float" and not number:
                raise ValueError(f"{each.name}={value!r}: expected a finite number")
        try:
            start, stop = (float(bound) for bound in self.interval)
        except (TypeError, ValueError):
            raise ValueError(
                f"interval={self.interval!r}: expected two numbers, (start, stop)"
            ) from None
        object.__setattr__(self, "interval", (start, stop))
        if not 0 <= start <= stop <= 1:
            raise ValueError(
                f"interval={self.interval}: expected (start, stop) with "
                f"0 <= start <= stop <= 1, in progress from noise (0) to image (1)"
            )

    @property
    @abstractmethod
    def off(self) -> bool:
        """Whether the term's scale makes it contribute nothing."""

    def active(self, step: Step) -> bool:
        """Whether the term acts at this step."""
        start, stop = self.interval
        return not self.off and start <= step.progress < stop

    def check(self, model: Denoiser) -> None:  # noqa: B027 - most terms have nothing to check
        """Refuse a model this term cannot guide, before anything is evaluated."""

    @abstractmethod
    def contribution(self, ask: Question) -> Asking:
        """Ask, compute, and return the contribution to v, shape (b, c, h, w)."""
