"""The straight line: requests -> noise -> Sampler(Guidance(Denoiser)) -> latent -> Codec -> images.

:func:`draw` is this line for one compute batch. :func:`draw_batch` also draws unguided twins and
keeps attention, and returns it all as a :class:`Drawn` batch. Everything that takes images takes
such batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, Self, overload

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.guidance import GuidedDenoiser, Term
from sag_dit.noise import START, NoiseSource
from sag_dit.sampler import DDIM, Sampler, SampleStep, auto
from sag_dit.tensors import Labels
from sag_dit.traces import Captures, Maps, Recorder, Trace

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """One image that is asked for: its index in the set, its seed and stream, and its class.

    The noise of the image is a function of (``seed``, ``stream``) and the step. ``stream`` is the
    index where a whole set shares one seed, and 0 where every image brings its own.

    Example:
        >>> Request(index=0, seed=0, label=3, stream=0).label
        3
    """

    index: int  # type: ignore[assignment]  # a tuple's own method is not needed here
    seed: int
    label: int
    stream: int


@dataclass(frozen=True, eq=False)
class Chosen(Sequence[Request]):
    """A set of requests without some of them, looked up when asked for, not stored as a list.

    ``requests`` is the whole set. ``picks`` numbers the requests that remain.

    Example::

        rest = Chosen.of(requests, without=np.array([0, 1, 5]))
        rest[0], rest[1::2]
    """

    requests: Sequence[Request]
    picks: range
    gaps: NDArray[np.int64]
    """For each request that is left out, how many remaining ones come before it."""

    @classmethod
    def of(cls, requests: Sequence[Request], without: NDArray[np.int64]) -> Self:
        """Return all requests but those at the places ``without``, given in ascending order."""
        count = len(requests) - len(without)
        return cls(requests, range(count), without - np.arange(len(without)))

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, at: int) -> Request: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Request]: ...

    def __getitem__(self, at: int | slice) -> Request | Sequence[Request]:
        if isinstance(at, slice):
            return replace(self, picks=self.picks[at])
        pick = self.picks[at]
        return self.requests[pick + int(np.searchsorted(self.gaps, pick, side="right"))]


@dataclass(frozen=True)
class Settings:
    """How images are drawn; together with the model and a request this determines each pixel.

    The network always computes ``batch_size`` images at once: a shorter batch is padded, so that
    an image does not depend on how many others are drawn. Guidance asks for several rows per image;
    the network computes at most ``max_rows`` of them at once.

    Example:
        >>> Settings(steps=20).batch_size
        16
    """

    sampler: Sampler = field(default_factory=DDIM)
    steps: int = 50
    guidance: tuple[Term, ...] = ()
    batch_size: int = 16
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: expected 1 or more")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: expected 1 or more, or null for no bound")
        if self.max_rows is not None and self.max_rows < self.batch_size:
            raise ValueError(
                f"max_rows={self.max_rows}: expected at least batch_size={self.batch_size}; make "
                f"batch_size smaller instead"
            )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected 1 or more")

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        sampler: Sampler | None = None,
        steps: int = 50,
        guidance: Sequence[Term] = (),
        batch_size: int | None = None,
    ) -> Self:
        """Return settings whose sampler and batch size are the model's own unless they are given.

        A flow is solved by Euler's method and any other process by DDIM.
        """
        return cls(
            sampler=sampler or auto(model.denoiser.process),
            steps=steps,
            guidance=tuple(guidance),
            batch_size=model.batch_size if batch_size is None else batch_size,
        )

    def check(self, model: Model) -> None:
        """Refuse settings that this model cannot be sampled with, before any evaluation.

        Raises:
            ValueError: too many steps for the process, or a term that cannot guide the model.
        """
        self.sampler.check(model.denoiser.process, self.steps)
        for term in self.guidance:
            if not term.off:
                term.check(model.denoiser)
                term.check_sampler(self.sampler)

    def class_names(self, model: Model) -> tuple[str, ...]:
        """Return the classes that images may have: a term's if it brings any, else the model's."""
        guiding = [term.class_names(model.denoiser) for term in self.guidance if not term.off]
        return next(filter(None, guiding), model.class_names)


@dataclass(frozen=True)
class Pixels:
    """What determines the pixels of a run.

    A field that is added has to be marked ``LATER``; see :mod:`sag_dit.identity`.

    Example::

        from sag_dit import identity

        pixels = Pixels.of(model, settings, {"sag": SAG(0.5)}, {"seed": 0, "classes": "all"})
        print(identity.digest(identity.settings(pixels))[:8])
    """

    model: str
    weights_sha256: str
    network: Mapping[str, Any]
    codec: Mapping[str, Any]
    sampler: Mapping[str, Any]
    steps: int
    guidance: Mapping[str, Any]
    request: Mapping[str, Any]
    batch_size: int
    max_rows: int | None
    precision: str

    @classmethod
    def of(
        cls,
        model: Model,
        settings: Settings,
        guidance: Mapping[str, Term],
        request: Mapping[str, Any],
        precision: str = "32-true",
    ) -> Self:
        """Describe a run; ``guidance`` are its terms by name, ``request`` says which images."""
        active = {name: term for name, term in guidance.items() if not term.off}
        return cls(
            model=model.name,
            weights_sha256=model.sha256,
            network=model.config,
            codec=model.codec.config(),
            sampler=settings.sampler.identity(),
            steps=settings.steps,
            guidance={name: term.identity(model.denoiser) for name, term in active.items()},
            request=request,
            batch_size=settings.batch_size,
            max_rows=settings.max_rows,
            precision=precision,
        )


Watch = Callable[[SampleStep], None]
"""Called after every step with the state of the whole compute batch."""


def trajectory(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    captures: Captures | None = None,
) -> Iterator[SampleStep]:
    """Yield the sampler's steps for one compute batch, padded with copies of its last request.

    ``captures`` says which attention to read at a step; it is found in the step's prediction.
    Reading changes no pixel.

    Raises:
        ValueError: there are more requests than ``batch_size``, or an image became NaN or infinite;
            the message names the image and the step.
    """
    if not 0 < len(requests) <= settings.batch_size:
        raise ValueError(
            f"{len(requests)} requests in one batch: expected 1 to batch_size={settings.batch_size}"
        )
    denoiser = model.denoiser
    padding = settings.batch_size - len(requests)
    rows = [*requests, *[requests[-1]] * padding]
    noise = NoiseSource([row.seed for row in rows], [row.stream for row in rows])
    x = noise.normal(START, denoiser.latent_shape).to(denoiser.device)
    cond = denoiser.conditions([row.label for row in rows])
    read = captures or (lambda _: ())
    guided = GuidedDenoiser(denoiser, settings.guidance, noise=noise, max_rows=settings.max_rows)
    for step in settings.sampler.steps(
        lambda x_t, step: guided(x_t, step, cond, read(step)),
        x,
        denoiser.process,
        settings.steps,
        noise,
        denoiser.x_0_range,
    ):
        _refuse_non_finite(step, requests)
        yield step


def draw(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    watch: Watch | None = None,
    captures: Captures | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """Draw the images of one compute batch, uint8, in the order of the requests.

    Raises:
        ValueError: as :func:`trajectory`.
    """
    x = None
    with torch.no_grad():
        for step in trajectory(model, requests, settings, captures):
            x = step.x
            if watch is not None:
                watch(step)
        assert x is not None
        images: Tensor = model.codec.decode(x[: len(requests)])
        return images


@dataclass(frozen=True, eq=False)
class Drawn:
    """One batch of finished images, with twins and traces of some of them.

    ``twins`` holds images drawn from the same noise without guidance, ``traces`` the attention that
    was kept; both by the index of the image.

    Example:
        >>> images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        >>> Drawn([Request(index=7, seed=0, label=3, stream=7)], images).indices
        tensor([7])
    """

    requests: Sequence[Request]
    images: UInt8[Tensor, "b c h w"]
    twins: Mapping[int, UInt8[Tensor, "c h w"]] = field(default_factory=dict)
    traces: Mapping[int, Trace] = field(default_factory=dict)

    @property
    def indices(self) -> Labels:
        """The places of the images in their set."""
        return torch.tensor([request.index for request in self.requests])


def draw_batch(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    *,
    twins: Collection[int] = (),
    traced: Collection[int] = (),
    maps: Maps | None = None,
    watch: Watch | None = None,
) -> Drawn:
    """Draw one compute batch, with twins of the indices in ``twins`` and traces of ``traced``.

    ``maps`` says of which layers a trace keeps attention. ``watch`` is called after every step of
    the images, not of the twins. Neither changes a pixel of the images.

    Raises:
        ValueError: as :func:`trajectory`.

    Example::

        drawn = draw_batch(model, [Request(0, 0, 3, 0)], settings, twins=[0])
        drawn.images[0], drawn.twins[0]
    """
    rows = {request.index: row for row, request in enumerate(requests)}
    recorder = None
    if rows.keys() & set(traced):
        recorder = Recorder(model.denoiser, settings.steps, settings.guidance, maps)

    def tell(step: SampleStep) -> None:
        for each in (recorder, watch):
            if each is not None:
                each(step)

    images = draw(model, requests, settings, tell, None if recorder is None else recorder.captures)
    kept = {}
    if recorder is not None:
        kept = {index: recorder.trace(row) for index, row in rows.items() if index in traced}
    # The twins are a batch of their own: the same requests, in the same order, unguided.
    paired = [request for request in requests if request.index in twins]
    unguided = draw(model, paired, replace(settings, guidance=())) if paired else ()
    pairs = zip(paired, unguided, strict=True)
    return Drawn(requests, images, {request.index: twin for request, twin in pairs}, kept)


def drawn(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    *,
    rank: int = 0,
    world: int = 1,
    watch: Watch | None = None,
) -> Iterator[Drawn]:
    """Draw a set batch by batch; of ``world`` ranks, this one draws batches rank, rank + world, ...

    With sharded weights every rank takes part in every forward pass, so all ranks draw equally
    often. A rank that has no batch left draws the last one again, and yields nothing for it.
    """
    size = settings.batch_size
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    for place in range(rank, rank + len(batches), world):
        batch = draw_batch(model, batches[min(place, len(batches) - 1)], settings, watch=watch)
        if place < len(batches):
            yield batch


def sample(
    model: Model,
    classes: Sequence[int | str],
    *,
    guidance: Sequence[Term] = (),
    steps: int = 50,
    seed: int = 0,
    sampler: Sampler | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """Draw one image per class; image i is the same as index i of ``sample.py`` with that class.

    Classes are numbers or names. Without ``sampler`` or ``batch_size``, :meth:`Settings.of` chooses
    them. ``watch`` is called after every step. Returns uint8 images (b, c, h, w) on the CPU.

    Raises:
        ValueError: a class the model does not have, or settings it cannot be sampled with.

    Example::

        images = sag_dit.sample(model, [3, 7], guidance=[sag_dit.SAG(0.5)], steps=20)
    """
    settings = Settings.of(
        model, sampler=sampler, steps=steps, guidance=guidance, batch_size=batch_size
    )
    settings.check(model)
    if not classes:
        raise ValueError("classes=[]: expected at least one class")
    requests = [
        Request(index, seed, label, stream=index)
        for index, label in enumerate(labels_of(classes, settings.class_names(model)))
    ]
    batches = drawn(model, requests, settings, watch=watch)
    return torch.cat([batch.images.cpu() for batch in batches])


def labels_of(classes: Sequence[object], names: Sequence[str]) -> list[int]:
    """Turn class numbers or names into labels.

    A number is taken as the label; if there is no such label, as the name of a class. A text is
    taken as a name; if there is no such name, as a number. Where both readings are classes, a
    warning says which one is taken.

    Raises:
        ValueError: a number outside the model's classes or an unknown name.

    Example::

        names = ("0", "1", "10", "2")
        labels_of([2, "2", 10], names)
    """
    labels = []
    for wanted in classes:
        by_name = _label_named(wanted, names)
        by_number = _label_numbered(wanted, len(names))
        first, second = (by_name, by_number) if isinstance(wanted, str) else (by_number, by_name)
        label = second if first is None else first
        if first is not None and second is not None and first != second:
            _tell_which(isinstance(wanted, str), str(wanted), first, names[first], second)
        if label is None:
            known = (
                "this model knows a single class, as unconditional ones do; leave classes out, or "
                "ask for 0"
                if len(names) == 1
                else f"expected a number from 0 to {len(names) - 1} or a name, such as "
                f"{', '.join(repr(name) for name in names[:5])}"
            )
            raise ValueError(f"class {wanted!r} does not exist: {known}")
        labels.append(label)
    return labels


def _label_named(wanted: object, names: Sequence[str]) -> int | None:
    readable = isinstance(wanted, (int, str)) and not isinstance(wanted, bool)
    return names.index(str(wanted)) if readable and str(wanted) in names else None


def _label_numbered(wanted: object, count: int) -> int | None:
    """Return a value as a label, None if it is no number or there is no such label."""
    readable = isinstance(wanted, (int, str)) and not isinstance(wanted, bool)
    try:
        number = int(str(wanted)) if readable else -1
    except ValueError:
        return None
    return number if 0 <= number < count else None


@cache
def _tell_which(named: bool, wanted: str, taken: int, name: str, other: int) -> None:
    """Warn, once, which class is meant where a number is also the name of another class."""
    if named:
        log.warning(
            'class "%s" is the class of that name, number %d; without quotes, %s is number %d',
            *(wanted, taken, wanted, other),
        )
    else:
        log.warning(
            'class %s is number %d, named %s; in quotes, "%s" is the class of that name, number %d',
            *(wanted, taken, name, wanted, other),
        )


def _refuse_non_finite(step: SampleStep, requests: Sequence[Request]) -> None:
    finite = step.x[: len(requests)].isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        broken = [
            request.index for request, ok in zip(requests, finite.tolist(), strict=True) if not ok
        ]
        raise ValueError(
            f"image {', '.join(map(str, broken))} became NaN or infinite at step "
            f"{step.step.index + 1} of {step.step.count} (t = {step.step.level.t}) and is not "
            f"written. Try trainer.precision=32-true, a smaller guidance scale or more steps"
        )
