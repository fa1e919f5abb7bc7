"""Branch, Question and Term: how a guidance method asks and what it returns.

A method is written as a generator that reads as its paper: ask, compute, ask, return. It yields
tuples of branches and receives one prediction for each; it returns its whole contribution to v at
the x_t of the base, its scale applied. The runner in ``guided.py`` steps all methods in lockstep.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sag_dit.attention import CaptureKind, Edit
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.identity import LATER, name_of, settings
from sag_dit.noise import NoiseSource
from sag_dit.process import NoiseLevel, Prediction, Process, Step
from sag_dit.sampler import Sampler
from sag_dit.sampler.usual import renoising
from sag_dit.tensors import Images, sent


def check_number(name: str, declared: object, value: object, unbounded: bool = False) -> None:
    """Refuse a value of the wrong type, for a field that declares a number or a bool.

    ``declared`` is the type or its name: float, int or bool, perhaps with ``| None``. Fields of
    other types are not checked. True and False do not count as numbers. ``unbounded`` allows
    infinite numbers.

    Raises:
        ValueError: the value does not fit; the message says what was expected.
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


Unit = Literal["progress", "t", "sigma"]
Bound: TypeAlias = float | None
Ramp = Literal["constant", "linear", "cosine"]
RAMPS: tuple[str, ...] = get_args(Ramp)
Tried: TypeAlias = tuple[float, float] | Sequence[Any] | Literal["each layer", "eighths"]
"""What a search tries of a setting: a range (low, high), a list of values, each self-attention
layer of the model, or an interval between eighths of the run."""
Schedule: TypeAlias = Ramp | Callable[[float], float]


def bounds(interval: object, unit: Unit) -> tuple[Bound, Bound]:
    """Return an interval as two numbers; None means that this side is open.

    Raises:
        ValueError: not two numbers, in the wrong order, or outside the run.
    """
    # The unit, and two bounds that are numbers or None.
    if unit not in get_args(Unit):
        raise ValueError(f"interval_in={unit!r}: expected one of {', '.join(get_args(Unit))}")
    try:
        first: float | None
        second: float | None
        first, second = interval  # type: ignore[misc]
        start = None if first is None else float(first)
        stop = None if second is None else float(second)
    except (TypeError, ValueError):
        names = "(start, stop)" if unit == "progress" else "(low, high)"
        raise ValueError(f"interval={interval!r}: expected two numbers, {names}") from None
    # Their order and range: progress runs from 0 to 1, t and sigma have no common range.
    if unit == "progress":
        start, stop = 0.0 if start is None else start, 1.0 if stop is None else stop
        if not 0 <= start <= stop <= 1:
            raise ValueError(
                f"interval={(start, stop)}: expected (start, stop) with "
                f"0 <= start <= stop <= 1, in progress from noise (0) to image (1)"
            )
    elif not (-math.inf if start is None else start) <= (math.inf if stop is None else stop):
        raise ValueError(
            f"interval={(start, stop)}: expected (low, high) with low <= high, in {unit}; None "
            f"(null) leaves a side open"
        )
    return start, stop


def check_times(interval: tuple[Bound, Bound], process: Process) -> None:
    """Refuse an interval in t whose bounds look like shares of the run, which progress means.

    Raises:
        ValueError: it ends at t <= 1, although the process has larger times.
    """
    first, high = float(process.grid(1)[0].t), interval[1]
    if high is not None and high <= 1 < first:
        raise ValueError(
            f"interval={interval} in t: this model's times fall from {first:g}; expected bounds "
            f"among them, (low, high), or interval_in=progress for shares of the run"
        )


def ratio(level: NoiseLevel) -> float:
    """Return sigma / alpha, infinite at pure noise."""
    alpha = float(level.alpha)
    return math.inf if alpha == 0 else float(level.sigma) / alpha


def acts(interval: tuple[Bound, Bound], unit: Unit, step: Step) -> bool:
    """Whether a step lies in an interval; the noisier bound belongs to it."""
    first = -math.inf if interval[0] is None else interval[0]
    second = math.inf if interval[1] is None else interval[1]
    if unit == "progress":
        return first <= step.progress < second
    value = float(step.level.t) if unit == "t" else ratio(step.level)
    return first < value <= second


def weight_of(schedule: Schedule, progress: float) -> float:
    """Return a schedule's weight at a progress of the run in [0, 1)."""
    if callable(schedule):
        return float(schedule(progress))
    if schedule == "linear":
        return 2 * progress
    if schedule == "cosine":
        return 1 - math.cos(math.pi * progress)
    return 1.0


BranchName = Literal["auto", "cond", "null"]
Need = Literal["classes", "flow", "blocks", "dit", "sizes", "text", "cross", "worse", "classifier"]
"""What a method needs. ``classes``, ``flow``, ``blocks`` and ``dit``: a model of several classes, a
flow, a network of transformer blocks, this package's DiT. ``sizes``: a network that takes images
of other sizes. ``text`` and ``cross``: attention to a text, beside the image's tokens or by itself,
and by itself alone. ``worse`` and ``classifier``: the user
gives a worse model, or a classifier of noisy images."""


@dataclass(frozen=True, eq=False)
class Branch:
    """An immutable question to a denoiser: which model, which x, which condition, which edits.

    What is captured on the way (layer, "saliency" or "map", heads) does not change the answer. So
    two branches that differ only in their captures are one question, and are asked once.
    ``level`` is the noise level that the network is told, None for the step's own.

    Example::

        good, worse = yield branch, branch.edited(Skip("blocks.5"))
    """

    model: Denoiser
    x_t: Images
    cond: Condition
    edits: tuple[Edit, ...] = ()
    captures: tuple[tuple[str, CaptureKind, int | None], ...] = ()
    level: NoiseLevel | None = None

    @property
    def key(self) -> tuple[int, int, int, tuple[Edit, ...], NoiseLevel | None]:
        """Its identity within one step: tensors are compared as objects, edits by value."""
        return (id(self.model), id(self.x_t), id(self.cond), self.edits, self.level)

    def capturing(
        self, layer: str, kind: CaptureKind = "saliency", heads: int | None = None
    ) -> Branch:
        """Return the same question that also reads ``layer``'s attention.

        The prediction's ``attention`` then holds it under :func:`capture_key` of the full name.
        """
        wish = (self.model.layer(layer).name, kind, heads)
        return replace(self, captures=(*self.captures, wish))

    def at(self, x_t: Images, level: NoiseLevel | None = None) -> Branch:
        """Return the question at another noisy image, without its captures.

        ``level`` is the image's noise level where that is another one.
        """
        return replace(self, x_t=x_t, captures=(), level=level or self.level)

    def edited(self, *edits: Edit) -> Branch:
        """Return the question with further edits."""
        return replace(self, edits=(*self.edits, *edits))


@dataclass(frozen=True, eq=False)
class Question:
    """What a term is told at one evaluation.

    ``base`` asks with the given condition, and as terms edit it. ``null`` asks with the null
    condition of the same model; it is None if the model has none. ``guided_by_cfg`` says whether
    classifier-free guidance is active at this step. ``memory`` is the term's own store for one run;
    it starts empty. ``noise`` is the images' own randomness, for terms that draw.
    ``sum_of_others`` is what :attr:`guided` returns.

    Example::

        cond, null = yield ask.base, ask.required_null()
    """

    step: Step
    base: Branch
    null: Branch | None
    guided_by_cfg: bool = False
    noise: NoiseSource | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    sum_of_others: Prediction | None = None

    @property
    def guided(self) -> Prediction:
        """The prediction that the other terms have guided, for a term that acts on it.

        Raises:
            ValueError: the term's class does not say that it acts on it.
        """
        if self.sum_of_others is None:
            raise ValueError(
                "ask.guided is known once the other terms have answered: state on_guided = True in "
                "the class of a method that asks for it"
            )
        return self.sum_of_others

    def branch(self, name: BranchName) -> Branch:
        """Return the branch to degrade; ``auto`` is null if CFG is active, else the base.

        Raises:
            ValueError: the null branch is asked of a model that has none.
        """
        if name == "cond" or (name == "auto" and not self.guided_by_cfg):
            return self.base
        return self.required_null()

    def draw(self, shape: Sequence[int], purpose: int) -> Tensor:
        """Return standard normal noise of this step, (b, *shape), each image's from its own stream.

        ``purpose`` keeps a method's numbers apart from the sampler's (0, 1) and other methods'.

        Raises:
            ValueError: the guided denoiser was given no source of noise.
        """
        if self.noise is None:
            raise ValueError(
                "this method draws random numbers of each image, and GuidedDenoiser was given no "
                "source of them; pass noise=NoiseSource(seeds, indices)"
            )
        drawn = self.noise.normal(self.step.index + 1, shape, purpose)
        return sent(drawn, self.base.x_t.device)

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


@dataclass(frozen=True, eq=False)
class Contribution:
    """What a term adds to v, and the part of it that moves x_0 alone.

    Noise is added back as if that part were not there. A term that returns one sets ``renoises``.

    Example::

        cond, null = yield ask.base, ask.required_null()
        return Contribution((w - 1) * (cond.v - null.v), x_0_only=w * (cond.v - null.v))
    """

    v: Tensor
    x_0_only: Tensor | None = None


Asking: TypeAlias = Generator[tuple[Branch, ...], tuple[Prediction, ...], Tensor | Contribution]
"""Yields branches, receives their predictions, returns a contribution to v."""


@dataclass(frozen=True)
class Term(ABC):
    """One guidance method; its contribution is multiplied by ``schedule`` at every step.

    ``scale`` means what the method's paper means by it. At ``neutral`` the term is off; a term with
    several ``strengths`` is off when all of them are neutral.

    ``interval`` says where the term acts, in the unit ``interval_in``. In ``progress`` it is the
    half-open share [start, stop) of the run, where 0 is pure noise. In ``t``, the network's time,
    or ``sigma``, the ratio sigma / alpha of noise to image, it is (low, high], and None leaves a
    side open. In every unit the noisier bound belongs to the interval and the cleaner one does not.
    So two intervals that meet at a bound share no step, and an interval of equal bounds holds none.

    ``schedule`` multiplies the contribution, at progress p of the run: ``constant`` by 1,
    ``linear`` by 2 p, ``cosine`` by 1 - cos(pi p), or by a function of p. The first three have mean
    1 over a run. A term that is off, outside its interval or multiplied by 0 never starts and costs
    nothing; one that ``remembers`` is told of every step nevertheless, unless it is off.

    ``every`` makes it cheaper: it asks the network at its first active step, and then at the
    sampler's steps 0, every, 2 every, ... Terms that start at different steps so ask together.
    Between them it contributes what it did last, in v, times the schedule of the step at hand. All
    evaluations of one step ask, or none does.

    Source: Kynkaanniemi et al. 2024 (intervals); Wang et al. 2024, arXiv 2404.13040 (schedules).

    Raises:
        ValueError: a number is not finite or not whole, the interval is the wrong way round, or the
            schedule is unknown.

    Example::

        @dataclass(frozen=True)
        class MyCFG(Term):
            def contribution(self, ask: Question) -> Asking:
                cond, null = yield ask.base, ask.required_null()
                return self.scale * (cond.v - null.v)
    """

    scale: float = 1.0
    _: KW_ONLY
    interval: tuple[Bound, Bound] = (0.0, 1.0)
    """Where the method acts; outside of it the method costs nothing."""
    interval_in: Unit = field(default="progress", metadata=LATER)
    """The unit of the bounds: progress from noise (0) to image (1), t, or sigma."""
    schedule: Schedule = field(default="constant", metadata=LATER)
    """What the contribution is multiplied by: constant, linear, cosine, or a function."""
    every: int = field(default=1, metadata=LATER)
    """Ask at every so many steps; between them the last contribution is held."""

    key: ClassVar[str]
    """What the identity of a run calls the method; no two methods may share a key."""
    former: ClassVar[tuple[str, ...]]
    """Names that runs used for it before it had a key; a new method has none."""
    title: ClassVar[str]
    """What tables call the method."""
    does: ClassVar[str]
    """What it does to the prediction, in a few words."""
    moves: ClassVar[str] = "in a way of its own"
    """Where it moves an image, for somebody who knows no methods: "NAME moved it ..."."""
    look: ClassVar[str] = "what has changed"
    """What to look at in an image that it moved: "look at it for ..."."""
    source: ClassVar[str]
    """Authors and year."""
    neutral: ClassVar[float] = 0.0
    """The scale at which the method does nothing."""
    most: ClassVar[float] = math.inf
    """The largest scale that it takes."""
    strengths: ClassVar[tuple[str, ...]] = ("scale",)
    """The fields that decide whether the method is off: it is if all of them are ``neutral``."""
    from_null: ClassVar[bool] = False
    """Whether the term guides away from the null condition, as CFG does; see Question.branch."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it needs of the model, apart from a null condition, and of the user."""
    instead: ClassVar[str] = "leave it out"
    """What to do where a model is no flow, and the method needs one."""
    example: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Settings, apart from the scale, with which tests run the method."""
    variants: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Further rows of the tables: the name of a setting, and the code that makes it."""
    on_guided: ClassVar[bool] = False
    """Whether it acts on the prediction that the others have guided, see Question.guided. Several
    such terms are given the same one, and their contributions are added up as all are."""
    remembers: ClassVar[bool] = False
    """Whether it goes by earlier steps. It is then asked at each step, also outside of its interval
    and where it holds; what it returns there is not used."""
    clamped: ClassVar[bool] = True
    """Whether a sampler that clamps x_0 clamps the term's contribution too."""
    renoises: ClassVar[bool] = False
    """Whether a part of its contribution moves x_0 alone, which not every sampler can do."""
    unbounded: ClassVar[tuple[str, ...]] = ()
    """Fields that may be infinite."""
    search: ClassVar[Mapping[str, Tried]] = MappingProxyType(
        {"scale": (0.1, 4.0), "interval": "eighths", "every": (1, 3)}
    )
    """What a search tries of each setting, those of the bases included; the others stay. The scale
    counts from ``neutral``."""

    def __post_init__(self) -> None:
        for each in fields(self):
            unbounded = each.name in self.unbounded
            check_number(each.name, each.type, getattr(self, each.name), unbounded)
        object.__setattr__(self, "interval", bounds(self.interval, self.interval_in))
        if not callable(self.schedule) and self.schedule not in RAMPS:
            raise ValueError(
                f"schedule={self.schedule!r}: expected {', '.join(RAMPS)} or a function of progress"
            )
        if self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more steps")

    @classmethod
    def searched(cls) -> dict[str, Tried]:
        """Return what a search tries of each setting of the method."""
        found: dict[str, Tried] = {}
        for each in reversed(cls.__mro__):
            found |= vars(each).get("search", {})
        return found

    @property
    def off(self) -> bool:
        """Whether the term's strengths make it contribute nothing."""
        return all(getattr(self, name) == self.neutral for name in self.strengths)

    def weight(self, step: Step) -> float:
        """Return what the contribution is multiplied by at this step."""
        return weight_of(self.schedule, step.progress)

    def active(self, step: Step) -> bool:
        """Whether the term acts at this step."""
        within = acts(self.interval, self.interval_in, step)
        return not self.off and within and self.weight(step) != 0

    def check(self, model: Denoiser) -> None:
        """Refuse a model this term cannot guide, before anything is evaluated."""
        if self.interval_in == "t":
            check_times(self.interval, model.process)
        if self.from_null and model.null(1) is None:
            key = getattr(self, "key", type(self).__name__.lower())
            others = (f"guidance.{key}.{each}" for each in self.strengths if each != "scale")
            off = " and ".join(f"{each}={self.neutral:g}" for each in (f"{key}_scale", *others))
            raise ValueError(
                f"{key}_scale={self.scale}: this model has no null condition (trained without "
                f"label dropout), so classifier-free guidance is impossible; set {off}"
            )
        if "flow" in self.needs and not model.process.is_flow:
            process = type(model.process).__name__
            raise ValueError(
                f"{self.key}_scale={self.scale}: {self.title} guides flow models, and this "
                f"model's process is {process}; {self.instead}"
            )

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse a sampler that this term cannot guide, before anything is evaluated."""
        if self.renoises and not sampler.renoises:
            key = getattr(self, "key", type(self).__name__.lower())
            name = getattr(sampler, "key", getattr(sampler, "name", type(sampler).__name__))
            raise ValueError(
                f"{key}_scale={self.scale}: sampler={name} mixes several predictions in a step, "
                f"and cannot add noise back with another one than x_0's; use one of "
                f"{', '.join(renoising())}"
            )

    def class_names(self, model: Denoiser) -> tuple[str, ...]:
        """Return the classes that this term lets images have; by default none."""
        return ()

    def identity(self, model: Denoiser) -> dict[str, Any]:
        """Return all that the term's contribution depends on, as plain values."""
        return {"term": name_of(type(self)), **settings(self)}

    def rewritten(self, ask: Question) -> Question:
        """Return the question as all methods are told it, while this one acts; see Rewriting."""
        return ask

    @abstractmethod
    def contribution(self, ask: Question) -> Asking:
        """Ask, compute, and return the contribution to v, shape (b, c, h, w).

        One of which a part moves x_0 alone is a :class:`Contribution`.
        """


@dataclass(frozen=True)
class BranchTerm(Term):
    """A method that makes one branch worse: ``cond``, the given condition, or ``null``.

    ``auto`` is null beside classifier-free guidance and cond otherwise.

    Raises:
        ValueError: another branch, or ``null`` for a model without a null condition.

    Example::

        @dataclass(frozen=True)
        class Noisier(BranchTerm):
            def contribution(self, ask: Question) -> Asking:
                branch = ask.branch(self.branch)
                good, worse = yield branch, branch.at(branch.x_t * 1.1)
                return self.scale * (good.v - worse.v)
    """

    _: KW_ONLY
    branch: BranchName = "cond"
    """Which prediction is made worse: cond, null, or auto: null beside CFG, else cond."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch not in ("auto", "cond", "null"):
            raise ValueError(f"branch={self.branch!r}: expected 'auto', 'cond' or 'null'")

    def check(self, model: Denoiser) -> None:
        """Refuse branch='null' for a model without a null condition."""
        super().check(model)
        if self.branch == "null" and model.null(1) is None:
            raise ValueError(
                "branch='null': this model has no null condition (trained without label dropout); "
                "use branch='cond'"
            )


class Rewriting(Term):
    """A method that changes how the network answers, and so needs no pass of its own.

    What it makes of the question is what all methods are told; it contributes nothing to the
    answers. A schedule multiplies its scale.

    Raises:
        ValueError: ``every`` is not 1, where nothing is held.

    Example::

        @dataclass(frozen=True)
        class Blind(Rewriting):
            def rewritten(self, ask: Question) -> Question:
                return replace(ask, base=ask.base.edited(Skip("blocks.5.attn")))
    """

    search = MappingProxyType({"every": [1]})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every != 1:
            raise ValueError(
                f"every={self.every}: {type(self).__name__} asks nothing by itself, so that there "
                f"is nothing to hold; set every=1"
            )

    @abstractmethod
    def rewritten(self, ask: Question) -> Question:
        """Return the question with other branches, which answer differently."""

    def contribution(self, ask: Question) -> Asking:
        """Return nothing further."""
        yield ()
        return torch.zeros_like(ask.base.x_t)
