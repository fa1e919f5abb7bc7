"""The package from Python: load a model, move it, draw with it, and look at what it drew.

Example::

    model = sag_dit.load("digits", device="cpu")
    out = model.sample([3, 7], guidance=SAG(0.5), steps=20, twins=True)
    out.images[0].save("three.png")
    out.gallery("my_gallery")
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from sag_dit import checkpoints, identity
from sag_dit.checkpoints import Model
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance import SAG, Autoguidance, Cache, ClassifierGuidance, Term
from sag_dit.noise import check_key
from sag_dit.output.bar import Bar
from sag_dit.output.gallery import About, Pair, data_uri, write_gallery
from sag_dit.output.telling import Recipe, about_images
from sag_dit.sampler import Sampler, SampleStep, named
from sag_dit.sampling import (
    Drawn,
    Found,
    Pixels,
    Request,
    Search,
    Settings,
    as_python,
    by_key,
    checked_search,
    drawn,
    in_our_words,
    labels_of,
    short_repr,
    tell_useless,
    trajectory,
)
from sag_dit.traces import AttentionView, Maps, Recorder, Trace

SHOWN = 16
"""Images that a notebook shows of itself."""


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Images that a model drew, with their twins and the attention that was kept.

    Attributes:
        tensor: the images, uint8 (b, c, h, w), on the CPU.
        labels: the name of each image's class, or its prompt.
        seed: of the set; image i also depends on i.
        settings: what determines the pixels, as plain values.
        twins_tensor: the same noise drawn without guidance, or None where that was not asked for.
        spared_tensor: second twins, drawn without one of several methods alone, or None.
        traces: the attention kept of each image; empty where none was asked for.
        step: the number of steps that are done.
        steps: the number of steps of the whole run; a sampler that asks the network twice in a
            step makes two of it.
        about: what the gallery tells of how the images were drawn.
        found: the score of each image, and whose noise it is made of; empty without a search.

    Example::

        out = model.sample([3, 7], guidance=SAG(0.5), twins=True)
        out.images[0].save("three.png")
        out.gallery("my_gallery")
    """

    tensor: UInt8[Tensor, "b c h w"]
    labels: tuple[str, ...]
    seed: int
    settings: Mapping[str, Any]
    twins_tensor: UInt8[Tensor, "b c h w"] | None
    spared_tensor: UInt8[Tensor, "b c h w"] | None
    traces: tuple[Trace, ...]
    step: int
    steps: int
    about: About
    found: tuple[Found, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The images, as PIL's."""
        return _as_pil(self.tensor)

    @property
    def twins(self) -> list[Image.Image]:
        """The unguided twins, as PIL's; empty unless ``twins=True``."""
        return [] if self.twins_tensor is None else _as_pil(self.twins_tensor)

    @property
    def maps(self) -> list[AttentionView]:
        """The attention of each image by layer and step; empty unless ``maps`` asks for it."""
        return [trace.maps for trace in self.traces if trace.maps is not None]

    def gallery(self, folder: str | Path) -> Path:
        """Write a page that shows each image beside its twin, and return its path.

        Raises:
            ValueError: the images were drawn without twins, or the folder is a file.
        """
        return self._gallery(folder, len(self))

    def _gallery(self, folder: str | Path, most: int) -> Path:
        if Path(folder).is_file():
            raise ValueError(f"folder={str(folder)!r} is a file; expected a folder, or a new name")
        if self.twins_tensor is None:
            raise ValueError(
                "a gallery shows images beside their twins, and these were drawn without; draw "
                "them with model.sample(..., twins=True)"
            )
        spared = self.spared_tensor
        pairs = [
            Pair(
                index,
                self.seed,
                label,
                _channels_last(self.tensor[index]),
                _channels_last(self.twins_tensor[index]),
                self.traces[index].steps if self.traces else (),
                None if spared is None else _channels_last(spared[index]),
            )
            for index, label in enumerate(self.labels[:most])
        ]
        about = replace(self.about, spared="") if spared is None else self.about
        title = f"sag_dit: {self.settings['model']}"
        return write_gallery(Path(folder), pairs, self.settings, title, about)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        _, channels, height, width = self.tensor.shape
        beside = ", with twins" * (self.twins_tensor is not None)
        done = "" if self.step == self.steps else f", step {self.step} of {self.steps}"
        return f"Samples({len(self)} images of {channels}x{height}x{width}{beside}{done})"

    def _repr_html_(self) -> str:
        """Show the gallery in a notebook, or the images alone where there are no twins.

        A notebook's file holds what it shows, so that these are the first :data:`SHOWN` images.
        """
        rest = ""
        if len(self) > SHOWN:
            how = ".images" if self.twins_tensor is None else ".gallery(&quot;FOLDER&quot;)"
            rest = f"<p>The first {SHOWN} of {len(self)}; <code>{how}</code> has all.</p>"
        if self.twins_tensor is None:
            cells = zip(self.labels[:SHOWN], self.tensor[:SHOWN], strict=True)
            return rest + "".join(
                f'<img src="{data_uri(_channels_last(image))}" title="{html.escape(label)}" '
                f'alt="{html.escape(label)}" style="width:128px;image-rendering:pixelated;'
                f'display:inline-block;margin:2px">'
                for label, image in cells
            )
        with TemporaryDirectory() as folder:
            page = self._gallery(folder, SHOWN).read_text(encoding="utf-8")
        style = "width:100%;height:640px;border:0"
        return f'{rest}<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel(Model):
    """A model that can be moved and drawn with: what :func:`load` returns.

    Attributes:
        loaded: what :func:`load` or :func:`load_text` was told, so that a gallery can say it; empty
            for a model that was made in memory.

    Example:
        >>> load("digits").sample([3], steps=2)
        Samples(1 images of 1x8x8)
    """

    loaded: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Return a model, such as one that was made in memory, as one to draw with.

        Example::

            model = LoadedModel.of(from_denoiser(denoiser, "mine"))
        """
        return cls(**vars(model))

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.denoiser.device

    @property
    def loading(self) -> dict[str, Any]:
        """What else than the checkpoint :func:`load` has to be told, for the model as it is now."""
        told = {key: value for key, value in self.loaded.items() if key != "ckpt"}
        if self.device.type != "cpu":
            told["device"] = str(self.device)
        if self.dtype != torch.float32:
            told["dtype"] = self.dtype
        return told

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network computes."""
        return next(self.denoiser.network.parameters()).dtype

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move the model, in place, and return it.

        The autoencoder and the sampler's arithmetic stay in float32 whatever ``dtype`` is.

        Raises:
            ValueError: the device does not exist or cannot be used here, or a ``dtype`` that is no
                floating-point one.

        Example::

            model = sag_dit.load("DiT-XL-2").to("cuda", torch.bfloat16)
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        real = getattr(dtype, "is_floating_point", False)
        if dtype is not None and not real:
            raise ValueError(
                f"dtype={dtype}: expected torch.float32, torch.bfloat16 or torch.float16"
            )
        place = None if device is None else _usable(device)
        if place is not None or dtype is not None:
            self.denoiser.to(place, dtype)
        if place is not None:
            self.codec.to(place)
        return self

    def prompted(self, prompts: Sequence[str] | str) -> Self:
        """Return the same text model, its weights shared, with other prompts as its classes.

        Raises:
            ValueError: no prompt, or a model that is asked with classes.

        Example::

            model = sag_dit.load_text("FOLDER", "a red fox")
            out = model.prompted("a blue fox").sample(0)
        """
        listed = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not isinstance(self.denoiser, TextConditional) or not listed:
            raise ValueError(f"prompts={list(listed)}: expected a text model, and a prompt or more")
        denoiser = copy(self.denoiser)
        denoiser.class_names = listed
        return replace(self, denoiser=denoiser, class_names=listed)

    @in_our_words
    def sample(
        self,
        classes: Sequence[int | str] | int | str,
        *,
        guidance: Sequence[Term] | Term = (),
        sampler: Sampler | str = "auto",
        steps: int = 50,
        seed: int = 0,
        batch_size: int | None = None,
        share_prefixes: bool = False,
        search: Search | None = None,
        cache: Cache | None = None,
        twins: bool = False,
        maps: bool | Maps = False,
        progress: bool = False,
    ) -> Samples:
        """Draw one image per class; image i is that of index i of ``sample.py`` with that class.

        ``classes`` are numbers or names, and ``guidance`` terms; one of either needs no brackets.
        Classes may also be an array or a tensor.
        ``sampler`` is a name as at the command line, or a :class:`Sampler`. ``twins=True`` draws
        each image a second time, from the same noise without guidance, and beside several methods a
        third time without one of them, as the gallery of ``sample.py`` shows. ``maps=True`` keeps
        the attention of the layer that SAG reads; :class:`Maps` asks for others. ``progress=True``
        shows a bar on stderr. ``share_prefixes=True`` makes methods cheaper that change the network
        from some block on; images are the same but for rounding. ``search`` draws each image
        several times and keeps one, as in ``search=BestOf(8)``; ``found`` then tells the scores.
        ``cache=Cache(every=2, order=1)`` computes the network's blocks at every second step;
        images change.

        Raises:
            ValueError: a class that the model does not have, a value of another kind, or settings
                that it cannot be sampled with.

        Example::

            out = model.sample("7", guidance=[SAG(0.5), CFG(1.5)], sampler="dpmpp_2m", steps=20)
        """
        settings, requests, listed = self._asked(
            classes,
            guidance,
            sampler,
            steps,
            seed,
            batch_size,
            share_prefixes=share_prefixes,
            search=search,
            cache=cache,
            twins=twins,
            progress=progress,
        )
        wanted = self._maps(maps, settings)
        told = self._told(settings, requests, listed, batch_size)
        # Batch by batch; attention is kept where somebody will look at it.
        bar, batches, count = Bar(), list[Drawn](), 0

        def seen(step: SampleStep) -> None:
            nonlocal count
            count = step.step.count
            bar.step(step)

        if progress:
            bar.begin("sampling", total=len(requests))
            bar.begin_batch(settings.batch_size)
        traced = twins or wanted is not None
        try:
            for batch in drawn(
                self, requests, settings, watch=seen, twins=twins, traced=traced, maps=wanted
            ):
                batches.append(batch)
                bar.end_batch()
        finally:
            bar.stop()
        # All of them, in the order of the requests.
        unguided = [batch.twins for batch in batches] if twins else []
        spared = [each for batch in batches for each in batch.spared.values()]
        return Samples(
            tensor=torch.cat([batch.images.cpu() for batch in batches]),
            twins_tensor=_joined(unguided),
            spared_tensor=_joined(spared),
            traces=tuple(batch.traces[index] for batch in batches for index in batch.traces),
            step=count,
            steps=count,
            found=tuple(each for batch in batches for each in batch.found.values()),
            **told,
        )

    @in_our_words
    def watch(
        self,
        classes: Sequence[int | str] | int | str,
        *,
        every: int = 5,
        stop: Callable[[], bool] | None = None,
        guidance: Sequence[Term] | Term = (),
        sampler: Sampler | str = "auto",
        steps: int = 50,
        seed: int = 0,
        batch_size: int | None = None,
        share_prefixes: bool = False,
        cache: Cache | None = None,
        twins: bool = False,
        maps: bool | Maps = False,
    ) -> Iterator[Samples]:
        """Draw as :meth:`sample` does, and yield what is there after each ``every`` steps.

        Until the last, which holds the images that :meth:`sample` returns, they show the clean
        image x_0 that the network predicts so far. Drawing stops when the iterator is closed, or
        after a step where ``stop()`` is true. At most ``batch_size`` classes. Twins are the
        unguided ones alone.

        Raises:
            ValueError: as :meth:`sample`, more classes than ``batch_size``, or ``every`` below 1.

        Example::

            for out in model.watch("7", guidance=SAG(0.5), steps=20):
                out.images[0].save(f"step_{out.step}.png")
        """
        # Check all that is asked here, and not when the first image is taken.
        settings, requests, listed = self._asked(
            classes,
            guidance,
            sampler,
            steps,
            seed,
            batch_size,
            share_prefixes=share_prefixes,
            cache=cache,
            twins=twins,
        )
        if _whole("every", every) < 1:
            raise ValueError(f"every={every}: expected 1 or more steps")
        if len(requests) > settings.batch_size:
            raise ValueError(
                f"{len(requests)} classes are watched in one batch: expected at most "
                f"batch_size={settings.batch_size}; make it larger"
            )
        wanted = self._maps(maps, settings)
        told = self._told(settings, requests, listed, batch_size)
        return self._frames(settings, requests, every, stop, twins, wanted, told)

    def _frames(
        self,
        settings: Settings,
        requests: Sequence[Request],
        every: int,
        stop: Callable[[], bool] | None,
        twins: bool,
        wanted: Maps | None,
        told: Mapping[str, Any],
    ) -> Iterator[Samples]:
        """Yield what is watched; all is checked."""
        recorder = Recorder(self.denoiser, settings.guidance, wanted)
        # What is shown has been found to be finite.
        guided = trajectory(self, requests, settings, recorder.captures, look=every)
        plain = replace(settings, guidance=())
        unguided = trajectory(self, requests, plain, look=every) if twins else None
        # Images and twins go side by side, a step of each at a time.
        while True:
            with torch.no_grad():
                step = next(guided, None)
                if step is None:
                    return
                twin = None if unguided is None else next(unguided)
                recorder(step)
                if stop is not None and stop():
                    return
                done = step.step.index + 1
                last = done == step.step.count
                if not last and done % every:
                    continue
                out = Samples(
                    tensor=self._seen(step, len(requests), last),
                    twins_tensor=None if twin is None else self._seen(twin, len(requests), last),
                    spared_tensor=None,
                    traces=tuple(recorder.trace(row) for row in range(len(requests))),
                    step=done,
                    steps=step.step.count,
                    **told,
                )
            yield out

    def _seen(self, step: SampleStep, count: int, last: bool) -> Tensor:
        x = step.x if last else step.prediction.clamped(self.denoiser.x_0_range).x_0
        pixels: Tensor = self.codec.decode(x[:count])
        return pixels.cpu()

    def _asked(
        self,
        classes: Any,
        guidance: Any,
        sampler: Any,
        steps: Any,
        seed: Any,
        batch_size: Any,
        *,
        share_prefixes: Any,
        search: Any = None,
        cache: Any = None,
        **switches: Any,
    ) -> tuple[Settings, list[Request], list[int | str]]:
        """Check what is asked for before anything is computed; return the classes as a list too."""
        # Kinds of values first, so that what is told of them later is about what they say.
        steps, seed = _whole("steps", steps), _whole("seed", seed)
        if batch_size is not None:
            batch_size = _whole("batch_size", batch_size)
        for name, value in {"share_prefixes": share_prefixes, **switches}.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={short_repr(value)}: expected True or False")
        if not isinstance(cache, (Cache, type(None))):
            raise ValueError(
                f"cache={short_repr(cache)}: expected how, as in cache=Cache(every=2, order=1)"
            )
        check_key("seed", seed)
        terms = (guidance,) if isinstance(guidance, Term) else guidance
        if not isinstance(terms, Sequence) or not all(isinstance(term, Term) for term in terms):
            raise ValueError(
                f"guidance={short_repr(guidance)}: expected a term or a list of them, as in "
                f"guidance=[SAG(0.5), CFG(1.5)]"
            )
        if isinstance(sampler, str):
            sampler = named(sampler, self.denoiser.process)
        if not isinstance(sampler, Sampler):
            raise ValueError(
                f"sampler={short_repr(sampler)}: expected a name, such as 'dpmpp_2m', or a Sampler"
            )
        # How they are drawn, and whether this model can be.
        settings = Settings.of(
            self,
            sampler=sampler,
            steps=steps,
            guidance=terms,
            batch_size=batch_size,
            share_prefixes=share_prefixes,
            search=checked_search(search),
            cache=cache,
        )
        settings.check(self)
        tell_useless(settings, self)
        # Which images.
        classes = as_python(classes)
        listed = [classes] if isinstance(classes, (int, str)) else classes
        if not isinstance(listed, Sequence) or not listed:
            raise ValueError(
                f"classes={short_repr(classes)}: expected a class or a list of classes, as numbers "
                f"or names"
            )
        listed = [as_python(each) for each in listed]
        labels = labels_of(listed, settings.class_names(self))
        requests = [Request(i, seed, label, stream=i) for i, label in enumerate(labels)]
        return settings, requests, listed

    def _maps(self, maps: bool | Maps, settings: Settings) -> Maps | None:
        if isinstance(maps, Maps):
            return maps
        if not isinstance(maps, bool):
            raise ValueError(
                f"maps={short_repr(maps)}: expected True, False, or which, as in "
                f"maps=Maps(layers=('blocks.3',)) of sag_dit.traces"
            )
        if not maps:
            return None
        terms = (term for term in settings.guidance if isinstance(term, SAG) and not term.off)
        sag = next(terms, SAG())
        return Maps(layers=tuple(layer.name for layer in sag.layers(self.denoiser)), limit=sag)

    def _told(
        self,
        settings: Settings,
        requests: Sequence[Request],
        classes: Sequence[int | str],
        batch_size: int | None,
    ) -> dict[str, Any]:
        """Return what is known of images before they are drawn."""
        names, seed = settings.class_names(self), requests[0].seed
        labels = tuple(names[request.label] for request in requests)
        rule = {"seed": seed, "classes": list(dict.fromkeys(labels))}
        guidance = by_key(settings.guidance)
        pixels = identity.settings(Pixels.of(self, settings, guidance, rule))
        shown = ("model", "sampler", "steps", "guidance", "request", "search")
        # As somebody would type it; one prompt needs no numbers.
        prompts: tuple[str, ...] | str | None = None
        if isinstance(self.denoiser, TextConditional):
            prompts = labels[0] if len({*labels}) == 1 else names
        recipe = Recipe(
            str(self.loaded.get("ckpt", "")),
            settings.sampler,
            steps=settings.steps,
            seed=seed,
            guidance=guidance,
            num_classes=len(names),
            classes=classes,
            num_images=len(requests),
            prompt=prompts,
            batch_size=batch_size,
            share_prefixes=settings.share_prefixes,
            search=settings.search,
            cache=settings.cache,
            loading=self.loading,
        )
        return {
            "labels": labels,
            "seed": seed,
            "settings": {key: pixels[key] for key in shown if key in pixels},
            "about": about_images(recipe, settings, self.denoiser),
        }

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.denoiser.latent_shape))
        count = sum(each.numel() for each in self.denoiser.network.parameters())
        return (
            f"{type(self).__name__}({self.name}: {type(self.denoiser.network).__name__}, "
            f"{count / 1e6:.1f} M parameters, {len(self.class_names)} classes, "
            f"{'pixels' if self.vae is None else 'latents'} {shape}, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')})"
        )


@in_our_words
def load(
    ckpt: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ema: bool | float = True,
    vae: str | Path | Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> LoadedModel:
    """Load a published name, a file or folder of any supported layout, or a hub repository.

    ``device`` and ``dtype`` are those of :meth:`LoadedModel.to`; without them the model is on the
    CPU, in float32. ``ema``, ``vae``, ``num_heads`` and ``size`` are those of
    :func:`checkpoints.load`.

    Raises:
        ValueError: the checkpoint or its autoencoder is not found, damaged, foreign or does not
            fit; or the device cannot be used.

    Example:
        >>> load("digits").denoiser.latent_shape
        (1, 8, 8)
    """
    place = None if device is None else _usable(device)
    model = checkpoints.load(_checkpoint(ckpt), ema=ema, vae=vae, num_heads=num_heads, size=size)
    ema_told = None if ema is True else ema
    told = _given(ckpt=ckpt, ema=ema_told, vae=vae, num_heads=num_heads, size=size)
    return replace(LoadedModel.of(model), loaded=told).to(place, dtype)


@in_our_words
def load_text(
    ckpt: str | Path,
    prompts: Sequence[str] | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    vae: str | Path | Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a text model as one whose classes are ``prompts``; see :func:`checkpoints.load_text`.

    Raises:
        ValueError: as there, or the device cannot be used.

    Example::

        model = sag_dit.load_text("stabilityai/stable-diffusion-3-medium-diffusers", "a red fox")
        out = model.sample(0, guidance=CFG(5.0))
    """
    place = None if device is None else _usable(device)
    model = checkpoints.load_text(
        _checkpoint(ckpt),
        [prompts] if isinstance(prompts, str) else prompts,
        negative_prompt=negative_prompt,
        size=size,
        guidance=guidance,
        vae=vae,
    )
    negative = negative_prompt or None
    told = _given(ckpt=ckpt, negative_prompt=negative, size=size, guidance=guidance, vae=vae)
    return replace(LoadedModel.of(model), loaded=told).to(place, dtype)


def _checkpoint(ckpt: object) -> str | Path:
    if not isinstance(ckpt, (str, Path)):
        raise ValueError(f"ckpt={short_repr(ckpt)}: expected a name, or a path of a file or folder")
    return ckpt


def _whole(name: str, value: Any) -> int:
    """Return a whole number, also one of NumPy's, as Python's.

    Raises:
        ValueError: it is none.
    """
    number = as_python(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name}={short_repr(value)}: expected a whole number")
    return number


def _given(**options: Any) -> dict[str, Any]:
    """Return options that are not None, paths as text."""
    given = {key: value for key, value in options.items() if value is not None}
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}


def with_models(terms: Mapping[str, Term]) -> dict[str, Term]:
    """Return the terms with the models that those that are on name by a path or a name loaded.

    Raises:
        ValueError: one is not found, damaged, or of another kind.

    Example::

        named = {"auto": Autoguidance(2.0, ckpt="EARLIER.ckpt")}
        out = model.sample(3, guidance=list(with_models(named).values()))
    """
    made = dict(terms)
    for name, term in terms.items():
        if term.off:
            continue
        if isinstance(term, Autoguidance) and term.ckpt is not None:
            worse = _worse_model(term.ckpt, True if term.ema is None else term.ema)
            # A folder's name tells the worse model by its weights, so that its path is no part.
            made[name] = replace(term, ckpt=None, ema=None, worse=worse)
        elif isinstance(term, ClassifierGuidance) and isinstance(term.classifier, str):
            made[name] = replace(term, classifier=_classifier(term.classifier))
    return made


@cache
def _worse_model(ckpt: str, ema: bool | float) -> nn.Module:
    """Return a worse model, read once for all rows of a comparison and all jobs of a sweep."""
    return checkpoints.load_denoiser(ckpt, ema=ema)


@cache
def _classifier(name: str) -> nn.Module:
    """Return a classifier, read once as well."""
    return checkpoints.load_classifier(name)


def _usable(device: torch.device | str) -> torch.device:
    """Return a device on which a tensor was made.

    Raises:
        ValueError: there is no such device here.
    """
    named = str(device).removeprefix("torch.")
    named = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(named, named)
    if isinstance(getattr(torch, named, None), torch.dtype):
        raise ValueError(f"device={str(device)!r} is no device: write dtype=torch.{named}")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({reason}); expected 'cpu', or a device "
            f"that this PyTorch sees, such as 'cuda' or 'mps'"
        ) from None
    return place


def _channels_last(image: Tensor) -> Any:
    """Turn an image (c, h, w) into an array (h, w, c)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def _as_pil(images: Tensor) -> list[Image.Image]:
    arrays = [_channels_last(image) for image in images]
    return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in arrays]


def _joined(parts: Sequence[Mapping[int, Tensor]]) -> Tensor | None:
    """Return the images of all batches as one tensor on the CPU, None without any."""
    images = [image for part in parts for image in part.values()]
    return torch.stack(images).cpu() if images else None
