"""The straight line: requests -> noise -> Sampler(Guidance(Denoiser)) -> latent -> Codec -> images.

:func:`draw` is this line for one compute batch. :func:`draw_batch` also draws unguided twins and
keeps attention, and returns it all as a :class:`Drawn` batch. Everything that takes images takes
such batches.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, wraps
from typing import Any, ClassVar, NamedTuple, ParamSpec, Self, TypeVar, overload

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.denoiser import Denoiser
from sag_dit.guidance import SAG, Cache, Cost, GuidedDenoiser, Term, cost_of
from sag_dit.identity import LATER
from sag_dit.identity import settings as plain_settings
from sag_dit.methods import methods
from sag_dit.noise import ALONE, START, Lineage, NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.profiling import each_timed, part
from sag_dit.sampler import DDIM, Sampler, SampleStep, auto
from sag_dit.tensors import Labels, sent
from sag_dit.traces import Captures, Maps, Recorder, Trace

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

WORDS: Mapping[str, str] = {
    "num_inference_steps": "steps={}",
    "num_steps": "steps={}",
    "guidance_scale": "guidance=CFG({})",
    "class_labels": "classes={}",
    "prompt": "model.prompted({}).sample(0)",
    "num_images_per_prompt": "a class for each image, as in classes=[3] * {}",
    "generator": "seed=0",
    "scheduler": "sampler='dpmpp_2m'",
    "torch_dtype": "dtype={}",
}
"""What diffusers calls arguments, and what is written here instead."""


class Request(NamedTuple):
    """One image that is asked for: its index in the set, its seed and stream, and its class.

    The noise of the image is a function of (``seed``, ``stream``) and the step. ``stream`` is the
    index where a whole set shares one seed, and 0 where every image brings its own. ``lineage``
    says which of an image's particles the noise is, where a search has made some.

    Example:
        >>> Request(index=0, seed=0, label=3, stream=0).label
        3
    """

    index: int  # type: ignore[assignment]  # a tuple's own method is not needed here
    seed: int
    label: int
    stream: int
    lineage: Lineage = ALONE

    def particle(self, number: int) -> Request:
        """Return the request of one of the image's particles."""
        return self._replace(lineage=((START, number),))


@dataclass(frozen=True)
class Found:
    """What a search chose for one image: its score, and whose noise it is made of.

    A request with this ``lineage`` draws the image again without a search.

    Example:
        >>> Found(score=0.9, lineage=((0, 2), (6, 1))).particle
        1
    """

    score: float
    lineage: Lineage

    @property
    def particle(self) -> int:
        """The number of the chosen particle."""
        return self.lineage[-1][1]


class Search(ABC):
    """Draws each image several times, as particles, and chooses one; see :mod:`sag_dit.search`.

    Example::

        settings = Settings.of(model, search=BestOf(8))
        drawn = draw_batch(model, requests, settings)
        print(drawn.found[0].score)
    """

    key: ClassVar[str]
    """What the identity of a run calls it."""

    @abstractmethod
    def check(self, model: Model, settings: Settings) -> None:
        """Refuse what this search cannot work with, before anything is drawn.

        Raises:
            ValueError: what does not fit, and the remedy.
        """

    @abstractmethod
    def identity(self, model: Model) -> dict[str, Any]:
        """Return all that the choice depends on, as plain values."""

    @abstractmethod
    def cost(self, alone: Cost) -> Cost:
        """Return the cost of the search, given that of an image without it."""

    @abstractmethod
    def find(
        self, model: Model, requests: Sequence[Request], settings: Settings, watch: Watch | None
    ) -> tuple[UInt8[Tensor, "b c h w"], list[Found]]:
        """Draw one compute batch; return the images that were chosen, and what is known of them.

        ``settings`` are those of one image, without the search.
        """


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
    the network computes at most ``max_rows`` of them at once. With ``share_prefixes`` rows that
    differ from a block of the network on share the blocks before it. A ``search`` draws each image
    several times and chooses one. With a ``cache`` the blocks run at some of the steps only.

    Example:
        >>> Settings(steps=20).batch_size
        16
    """

    sampler: Sampler = field(default_factory=DDIM)
    steps: int = 50
    guidance: tuple[Term, ...] = ()
    batch_size: int = 16
    max_rows: int | None = None
    share_prefixes: bool = False
    search: Search | None = None
    cache: Cache = field(default_factory=Cache)

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
        share_prefixes: bool = False,
        search: Search | None = None,
        cache: Cache | None = None,
    ) -> Self:
        """Return settings whose sampler and batch size are the model's own unless they are given.

        A flow is solved by Euler's method and any other process by DDIM.
        """
        return cls(
            sampler=sampler or auto(model.denoiser.process),
            steps=steps,
            guidance=tuple(guidance),
            batch_size=model.batch_size if batch_size is None else batch_size,
            share_prefixes=share_prefixes,
            search=search,
            cache=cache or Cache(),
        )

    def check(self, model: Model) -> None:
        """Refuse settings that this model cannot be sampled with, before any evaluation.

        Raises:
            ValueError: too many steps for the process, a term that cannot guide the model, or a
                search or a cache that does not fit.
        """
        self.sampler.check(model.denoiser.process, self.steps)
        self.cache.check(model.denoiser, self.share_prefixes)
        for term in self.guidance:
            if not term.off:
                term.check(model.denoiser)
                term.check_sampler(self.sampler)
        if self.search is not None:
            self.search.check(model, self)

    def guided(self, denoiser: Denoiser, noise: NoiseSource) -> GuidedDenoiser:
        """Return the denoiser as these settings guide it, for one batch."""
        return GuidedDenoiser(
            denoiser,
            self.guidance,
            noise=noise,
            max_rows=self.max_rows,
            share_prefixes=self.share_prefixes,
            cache=self.cache,
        )

    def cost(self, denoiser: Denoiser) -> Cost:
        """Return what drawing costs with these settings."""
        alone = cost_of(
            denoiser,
            self.guidance,
            self.sampler,
            self.steps,
            max_rows=self.max_rows and self.max_rows // self.batch_size,
            share_prefixes=self.share_prefixes,
            cache=self.cache,
        )
        return alone if self.search is None else self.search.cost(alone)

    def unshared(self, denoiser: Denoiser) -> str | None:
        """Return a sentence that says why ``share_prefixes`` saves nothing, None where it does."""

        def spares(settings: Settings) -> bool:
            return settings.cost(denoiser) != replace(settings, share_prefixes=False).cost(denoiser)

        if not self.share_prefixes or spares(self):
            return None
        if denoiser.chain_length is None:
            why = f"a {type(denoiser.network).__name__} is no chain of blocks that rows can join"
        elif spares(replace(self, max_rows=None)):
            why = f"max_rows={self.max_rows} parts the rows that could share; make it larger"
        else:
            why = "no method that is on changes the network from a block behind the first one on"
        return f"share_prefixes=true saves nothing here: {why}"

    def uncached(self, denoiser: Denoiser) -> str | None:
        """Return a sentence that says why the cache saves nothing, None where it does."""

        def spares(settings: Settings) -> bool:
            return settings.cost(denoiser) != replace(settings, cache=Cache()).cost(denoiser)

        if self.cache.off or spares(self):
            return None
        why = "there are too few steps"
        if spares(replace(self, guidance=())):
            on = [term for term in self.guidance if not term.off]
            # Those that save nothing alone; where each would, all of them together.
            anew = [term for term in on if not spares(replace(self, guidance=(term,)))] or on
            names = ", ".join(dict.fromkeys(map(key_of, anew)))
            why = f"{names} asks at every step what cannot be kept; give it every=2"
        return f"cache.every={self.cache.every} saves nothing here: {why}"

    def useless(self, denoiser: Denoiser) -> str | None:
        """Return a sentence that says what is on and saves nothing, None where all does."""
        return self.unshared(denoiser) or self.uncached(denoiser)

    @property
    def unguided(self) -> Self:
        """The settings of a twin: neither guidance nor a search."""
        return replace(self, guidance=(), search=None)

    @property
    def spared(self) -> str | None:
        """The method that a gallery's second twin is drawn without, by its key.

        Of several that are on it is SAG, else the last; of fewer it is None.
        """
        keys = [key_of(term) for term in self.guidance if not term.off]
        return None if len({*keys}) < 2 else SAG.key if SAG.key in keys else keys[-1]

    def without(self, key: str) -> Self:
        """Return the settings of a twin without the terms of a method, and without a search."""
        kept = tuple(term for term in self.guidance if key_of(term) != key)
        return replace(self, guidance=kept, search=None)

    def class_names(self, model: Model) -> tuple[str, ...]:
        """Return the classes that images may have: a term's if it brings any, else the model's."""
        guiding = [term.class_names(model.denoiser) for term in self.guidance if not term.off]
        return next(filter(None, guiding), model.class_names)


@dataclass(frozen=True)
class Pixels:
    """What determines the pixels of a run.

    A field that is added has to be marked ``LATER``; see :mod:`sag_dit.identity`. ``islands`` is
    true where the network's weights have 16 bits, and all else is computed in float32: before,
    times and variances were rounded to 16 bits as well.

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
    matmul: str = field(default="highest", metadata=LATER)
    compile: bool = field(default=False, metadata=LATER)
    islands: bool = field(default=False, metadata=LATER)
    share_prefixes: bool = field(default=False, metadata=LATER)
    search: Mapping[str, Any] | None = field(default=None, metadata=LATER)
    cache: Mapping[str, Any] | None = field(default=None, metadata=LATER)

    @classmethod
    def of(
        cls,
        model: Model,
        settings: Settings,
        guidance: Mapping[str, Term],
        request: Mapping[str, Any],
        precision: str = "32-true",
        matmul: str = "highest",
        compile: bool = False,
    ) -> Self:
        """Describe a run; ``guidance`` are its terms by name, ``request`` says which images.

        ``precision`` is the network's, as Lightning names it, ``matmul`` that of float32 products.
        """
        # A term that is off determines no pixel.
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
            matmul=matmul,
            compile=compile,
            islands=precision in ("bf16-true", "16-true"),
            share_prefixes=settings.share_prefixes,
            search=None if settings.search is None else settings.search.identity(model),
            cache=None if settings.cache.off else plain_settings(settings.cache),
        )


def key_of(term: Term) -> str:
    """Return the key of a term's method, of one without a key the name of its class."""
    return str(getattr(type(term), "key", type(term).__name__))


def by_key(guidance: Sequence[Term]) -> dict[str, Term]:
    """Return terms by their keys; of several with one key the later ones are numbered."""
    named: dict[str, Term] = {}
    for term in guidance:
        key = key_of(term)
        count = sum(type(each) is type(term) for each in named.values())
        named[f"{key}_{count + 1}" if count else key] = term
    return named


LOOK = 25
"""Steps after which a device is asked whether all images are finite."""
NEVER = 2**30
"""More steps than any run has."""

Watch = Callable[[SampleStep], None]
"""Called after every step with the state of the whole compute batch."""
Exchange = Callable[[SampleStep], Tensor | None]
"""Called after every step; says which row each row of the batch goes on as, or None: as itself."""


def part_of(watch: Watch | None, number: int, count: int) -> Watch | None:
    """Return what tells ``watch`` the steps of run ``number`` of ``count`` as those of one run."""
    if watch is None:
        return None

    def told(step: SampleStep) -> None:
        each = step.step
        whole = replace(each, index=number * each.count + each.index, count=count * each.count)
        watch(replace(step, step=whole))

    return told


def trajectory(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    captures: Captures | None = None,
    look: int | None = None,
    exchange: Exchange | None = None,
) -> Iterator[SampleStep]:
    """Yield the sampler's steps for one compute batch, padded with copies of its last request.

    ``captures`` says which attention to read at a step; it is found in the step's prediction.
    Reading changes no pixel. After every ``look`` steps, and after the last one, images that are
    not finite are refused; None is 1 on a CPU, and ``LOOK`` where a look waits for the device. With
    ``exchange`` rows go on as others between steps, where the sampler is steerable.

    Raises:
        ValueError: there are more requests than ``batch_size``, or an image became NaN or infinite;
            the message names the image and the step.
    """
    if not 0 < len(requests) <= settings.batch_size:
        raise ValueError(
            f"{len(requests)} requests in one batch: expected 1 to batch_size={settings.batch_size}"
        )
    # The noise and the condition of every row; copies of the last one fill the batch.
    denoiser = model.denoiser
    padding = settings.batch_size - len(requests)
    rows = [*requests, *[requests[-1]] * padding]
    noise = NoiseSource(
        [row.seed for row in rows], [row.stream for row in rows], [row.lineage for row in rows]
    )
    x = sent(noise.normal(START, denoiser.latent_shape), denoiser.device)
    cond = denoiser.conditions([row.label for row in rows])
    # The sampler asks the guided denoiser; what it makes is looked at for numbers that broke.
    read = captures or (lambda _: ())
    guided = settings.guided(denoiser, noise)
    broken = _Broken(requests, look or (1 if denoiser.device.type == "cpu" else LOOK))

    def denoise(x_t: Tensor, step: Step) -> Prediction:
        with part("guidance"):
            return guided(x_t, step, cond, read(step))

    steps = settings.sampler.steps(
        denoise, x, denoiser.process, settings.steps, noise, denoiser.x_0_range
    )
    for step in each_timed("sampler", steps):
        broken.note(step)
        yield step
        # In place, since the sampler begins its next step from this very x.
        places = None if exchange is None else exchange(step)
        if places is not None:
            step.x.copy_(step.x[places])
            guided.exchange(places)
    broken.refuse()


def draw(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    watch: Watch | None = None,
    captures: Captures | None = None,
    exchange: Exchange | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """Draw the images of one compute batch, uint8, in the order of the requests.

    No search is made, whatever the settings say.

    Raises:
        ValueError: as :func:`trajectory`.
    """
    x = None
    with torch.no_grad():
        for step in trajectory(model, requests, settings, captures, exchange=exchange):
            x = step.x
            if watch is not None:
                watch(step)
        assert x is not None
        with part("decode"):
            images: Tensor = model.codec.decode(x[: len(requests)])
        return images


@dataclass(frozen=True, eq=False)
class Drawn:
    """One batch of finished images, with twins and traces of some of them.

    ``twins`` holds images drawn from the same noise without guidance, ``spared`` others without one
    method alone, by its key. ``traces`` is the attention that was kept, ``found`` what a search
    chose. All are by the index of the image.

    Example:
        >>> images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        >>> Drawn([Request(index=7, seed=0, label=3, stream=7)], images).indices
        tensor([7])
    """

    requests: Sequence[Request]
    images: UInt8[Tensor, "b c h w"]
    twins: Mapping[int, UInt8[Tensor, "c h w"]] = field(default_factory=dict)
    traces: Mapping[int, Trace] = field(default_factory=dict)
    spared: Mapping[str, Mapping[int, UInt8[Tensor, "c h w"]]] = field(default_factory=dict)
    found: Mapping[int, Found] = field(default_factory=dict)

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
    spare: str | None = None,
) -> Drawn:
    """Draw one compute batch, with twins of the indices in ``twins`` and traces of ``traced``.

    ``maps`` says of which layers a trace keeps attention. ``watch`` is called after every step of
    the images, not of the twins. With ``spare``, a method's key, there are twins without this
    method alone as well. None of these changes a pixel of the images.

    Raises:
        ValueError: as :func:`trajectory`.

    Example::

        drawn = draw_batch(model, [Request(0, 0, 3, 0)], settings, twins=[0])
        drawn.images[0], drawn.twins[0]
    """
    # A search chooses the images; what belongs to them is drawn of the noise that was chosen.
    asked, chosen, found = requests, None, dict[int, Found]()
    if settings.search is not None:
        alone = replace(settings, search=None)
        chosen, each = settings.search.find(model, requests, alone, watch)
        pairs = zip(requests, each, strict=True)
        asked = [request._replace(lineage=one.lineage) for request, one in pairs]
        found = dict(zip((request.index for request in requests), each, strict=True))
        watch = None
    # The images, with what is kept of the attention; images that were found need no second drawing.
    rows = {request.index: row for row, request in enumerate(requests)}
    recorder = None
    if rows.keys() & set(traced):
        recorder = Recorder(model.denoiser, settings.guidance, maps)

    def tell(step: SampleStep) -> None:
        for each in (recorder, watch):
            if each is not None:
                each(step)

    captures = None if recorder is None else recorder.captures
    images = chosen
    if chosen is None or recorder is not None:
        seen = draw(model, asked, settings, tell, captures)
        images = seen if chosen is None else chosen
    assert images is not None
    kept = {}
    if recorder is not None:
        kept = {index: recorder.trace(row) for index, row in rows.items() if index in traced}
    # The twins are a batch of their own: the same requests, in the same order, unguided.
    paired = [request for request in asked if request.index in twins]

    def drawn_as(how: Settings) -> dict[int, Tensor]:
        seen = draw(model, paired, how) if paired else ()
        return {request.index: twin for request, twin in zip(paired, seen, strict=True)}

    unguided = drawn_as(settings.unguided)
    spared = {} if spare is None else {spare: drawn_as(settings.without(spare))}
    return Drawn(requests, images, unguided, kept, spared, found)


def drawn(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    *,
    rank: int = 0,
    world: int = 1,
    watch: Watch | None = None,
    twins: bool = False,
    traced: bool = False,
    maps: Maps | None = None,
) -> Iterator[Drawn]:
    """Draw a set batch by batch; of ``world`` ranks, this one draws batches rank, rank + world, ...

    With sharded weights every rank takes part in every forward pass, so all ranks draw equally
    often. A rank that has no batch left draws the last one again, and yields nothing for it.
    With ``twins`` each image has its twins, also one without :attr:`Settings.spared`, and with
    ``traced`` its trace; the rest is as in :func:`draw_batch`.
    """
    size = settings.batch_size
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    for place in range(rank, rank + len(batches), world):
        part = batches[min(place, len(batches) - 1)]
        indices = [request.index for request in part]
        batch = draw_batch(
            model,
            part,
            settings,
            twins=indices if twins else (),
            traced=indices if traced else (),
            maps=maps,
            watch=watch,
            spare=settings.spared if twins else None,
        )
        if place < len(batches):
            yield batch


def in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that a function does not have in a sentence that says what to write.

    Words of diffusers and of the command line are known, other ones are compared with its own.

    Example:
        >>> in_our_words(sample)(None, [3], guidance_scale=4.0)
        Traceback (most recent call last):
        ValueError: guidance_scale=4.0 is no argument of sample: write guidance=CFG(4.0)
    """
    known = inspect.signature(function).parameters

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name not in known:
                shown = short_repr(value)
                told = _in_our_words(name, shown, [each for each in known if each != "self"])
                raise ValueError(f"{name}={shown} is no argument of {function.__name__}: {told}")
        return function(*args, **kwargs)

    return checked


def _in_our_words(name: str, value: str, known: Sequence[str]) -> str:
    ours = {f"{each.key}_scale": f"guidance={each.name}({{}})" for each in methods()}
    word = {**ours, **WORDS}.get(name, "")
    if word and ("=" not in word or word.partition("=")[0].split()[-1] in known):
        return f"write {word.format(value)}"
    near = "".join(f"; did you mean {each}?" for each in get_close_matches(name, known, n=1))
    return f"expected {', '.join(known)}{near}"


def short_repr(value: object) -> str:
    """Return a value as a sentence names it: as Python writes it, or its kind if that is long.

    Example:
        >>> short_repr("pizza"), short_repr([0] * 100)
        ("'pizza'", 'a list')
    """
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 or "\n" in text else text


@in_our_words
def sample(
    model: Model,
    classes: Sequence[int | str],
    *,
    guidance: Sequence[Term] = (),
    steps: int = 50,
    seed: int = 0,
    sampler: Sampler | None = None,
    batch_size: int | None = None,
    share_prefixes: bool = False,
    search: Search | None = None,
    cache: Cache | None = None,
    watch: Watch | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """Draw one image per class; image i is the same as index i of ``sample.py`` with that class.

    Classes are numbers or names. Without ``sampler`` or ``batch_size``, :meth:`Settings.of` chooses
    them. ``share_prefixes``, ``search`` and ``cache`` are as in :class:`Settings`. ``watch`` is
    called after every step. Returns uint8 images (b, c, h, w) on the CPU.

    Raises:
        ValueError: a class the model does not have, or settings it cannot be sampled with.

    Example::

        images = sag_dit.sample(model, [3, 7], guidance=[sag_dit.SAG(0.5)], steps=20)
    """
    # Check all that is asked before anything is drawn.
    settings = Settings.of(
        model,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        share_prefixes=share_prefixes,
        search=checked_search(search),
        cache=cache,
    )
    settings.check(model)
    tell_useless(settings, model)
    if len(classes) == 0:
        raise ValueError("classes=[]: expected at least one class")
    # Draw as sample.py does with one seed for the set.
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
    for wanted in map(as_python, classes):
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
            word = isinstance(wanted, str) and not wanted.isdigit()
            for near in get_close_matches(str(wanted), names, n=1) if word else ():
                known += f"; did you mean {near!r}?"
            raise ValueError(f"class {wanted!r} does not exist: {known}")
        labels.append(label)
    return labels


def as_python(value: Any) -> Any:
    """Return an array, a tensor or one of their numbers as Python's lists and numbers.

    Example:
        >>> as_python(np.arange(3)), as_python(torch.tensor(7)), as_python("7")
        ([0, 1, 2], 7, '7')
    """
    return value.tolist() if hasattr(value, "tolist") else value


def checked_search(search: object) -> Search | None:
    """Return a search, or None.

    Raises:
        ValueError: it is neither.
    """
    if search is None or isinstance(search, Search):
        return search
    raise ValueError(f"search={short_repr(search)}: expected a search, such as BestOf(8), or None")


def tell_useless(settings: Settings, model: Model) -> None:
    """Warn where something is asked for that saves nothing."""
    useless = settings.useless(model.denoiser)
    if useless is not None:
        log.warning("%s", useless)


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


class _Broken:
    """Notes at which step each image first was NaN or infinite, on the device, and tells it later.

    To ask a GPU for a value waits until it has done all that it was given. So it is asked after
    every ``look`` steps only, and at the end.
    """

    def __init__(self, requests: Sequence[Request], look: int) -> None:
        self._requests, self._look = requests, look
        self._steps: list[Step] = []
        self._first: Tensor | None = None

    def note(self, step: SampleStep) -> None:
        """Note the state after a step; it is broken from the first such step on."""
        finite = step.x[: len(self._requests)].isfinite().flatten(1).all(dim=1)
        number = finite * NEVER + len(self._steps)
        self._first = number if self._first is None else torch.minimum(self._first, number)
        self._steps.append(step.step)
        if len(self._steps) % self._look == 0:
            self.refuse()

    def refuse(self) -> None:
        """Raise if an image is broken.

        Raises:
            ValueError: with the images that broke first, and the step.
        """
        first = [] if self._first is None else self._first.tolist()
        earliest = min(first, default=NEVER)
        if earliest >= NEVER:
            return
        pairs = zip(self._requests, first, strict=True)
        broken = dict.fromkeys(one.index for one, number in pairs if number == earliest)
        step = self._steps[earliest]
        raise ValueError(
            f"image {', '.join(map(str, broken))} became NaN or infinite at step "
            f"{step.index + 1} of {step.count} (t = {step.level.t}) and is not "
            f"written. Try trainer.precision=32-true, a smaller guidance scale or more steps"
        )
