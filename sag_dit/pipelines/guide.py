"""guide(pipe, ...): a diffusers pipeline's network, answered for by our guided denoiser of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from torch import Tensor, nn

from sag_dit.denoiser.text_conditional import TextConditional, layout_of
from sag_dit.guidance import Term
from sag_dit.pipelines.run import OwnCFG, Run, check_renoising, check_scheduler


@dataclass(frozen=True)
class Pipelines:
    """Pipelines that call their network alike.

    Attributes:
        pipelines: their classes; subclasses count.
        network: the pipeline's attribute that holds the network.
        own_cfg: the order of the rows under the pipeline's own classifier-free guidance; ``apart``
            is a second call for the null prompt, after that for the prompt.

    Example:
        >>> [family.name for family in FAMILIES if "FluxPipeline" in family.pipelines]
        ['FLUX']
    """

    name: str
    pipelines: tuple[str, ...]
    network: str = "transformer"
    own_cfg: OwnCFG = "null first"


FAMILIES = (
    Pipelines(
        "Stable Diffusion 1 and 2",
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
        ),
        network="unet",
    ),
    Pipelines(
        "Stable Diffusion XL",
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        network="unet",
    ),
    Pipelines("PixArt", ("PixArtAlphaPipeline", "PixArtSigmaPipeline")),
    Pipelines(
        "Stable Diffusion 3",
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
        ),
    ),
    Pipelines(
        "FLUX",
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline"),
        own_cfg="apart",
    ),
    Pipelines("DiT", ("DiTPipeline",), own_cfg="cond first"),
)


def pipelines_of(pipe: Any) -> Pipelines:
    """Return the family of a pipeline.

    Raises:
        ValueError: it is not known; the message lists the known pipelines.
    """
    names = [each.__name__ for each in type(pipe).__mro__]
    for family in FAMILIES:
        if any(name in names for name in family.pipelines):
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.pipelines)})" for family in FAMILIES)
    hint = ""
    if "PAG" in names[0] or "SAG" in names[0]:
        hint = "\nthis pipeline guides by itself: use the plain one of its family"
    elif names[0].startswith("Sana"):
        hint = "\nSana's attention is linear: there is no map to read or to edit"
    raise ValueError(f"{names[0]} cannot be guided; known are {known}{hint}")


def own_cfg_scale(family: Pipelines, pipe: Any, arguments: Mapping[str, Any]) -> float | None:
    """Return the scale of a pipeline's own guidance, None where a call asks for no null rows."""
    if family.own_cfg == "apart":
        return None
    # The properties where there are any: a callback may end or change the guidance within a call.
    scale = float(getattr(pipe, "guidance_scale", arguments["guidance_scale"]))
    own = getattr(pipe, "do_classifier_free_guidance", scale > 1)
    return scale if own else None


def network_of(family: Pipelines, pipe: Any) -> nn.Module:
    """Return the pipeline's network, also where ``torch.compile`` wraps it."""
    return uncached(getattr(pipe, family.network), f"pipe.{family.network}")


def uncached(network: nn.Module, name: str) -> nn.Module:
    """Return a network; ``name`` is what messages call it.

    Raises:
        ValueError: it caches what its layers compute.
    """
    wrapped = getattr(network, "_orig_mod", network)
    caching = getattr(wrapped, "is_cache_enabled", False)
    # A cache of diffusers is hooks in the layers that keep state, put in by enable_cache or not.
    registries = (getattr(module, "_diffusers_hook", None) for module in wrapped.modules())
    hooks = [hook for each in registries if each is not None for hook in each.hooks.values()]
    if caching or any(hook._is_stateful for hook in hooks):
        remedy = f"call {name}.disable_cache()" if caching else "load the pipeline without it"
        raise ValueError(
            f"{type(wrapped).__name__} caches what its layers compute from call to call, which "
            f"guidance's further calls would spoil; {remedy}"
        )
    return network


P = TypeVar("P")

USE = "with sag_dit.guide(pipe, SAG(0.75)): images = pipe(...).images"
"""How a pipeline is guided, in a line."""


class Guiding(AbstractContextManager[P], Generic[P]):
    """What :func:`guide` returns, to stand behind ``with``; used otherwise it says so.

    Raises:
        TypeError: it is called.

    Example::

        with guide(pipe, SAG(0.75)) as guided:
            image = guided("a corgi").images[0]
    """

    def __init__(self, context: AbstractContextManager[P]) -> None:
        self._context, self._entered = context, False

    def __enter__(self) -> P:
        self._entered = True
        return self._context.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._context.__exit__(kind, error, trace)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Say how a pipeline is guided."""
        self._entered = True  # The error tells enough.
        raise TypeError(f"guide(pipe, ...) is no pipeline and cannot be called; write {USE}")

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                f"guide(pipe, ...) without `with` guides nothing; write {USE}", stacklevel=2
            )


def guide(pipe: P, *terms: Term, max_rows: int | None = None, seed: int = 0) -> Guiding[P]:
    """Have a diffusers pipeline guided by any terms.

    The pipeline works as before: its scheduler, sizes, batches, precision, offloading, and its own
    classifier-free guidance u + w (c - u). What the terms contribute is added to u and to c, so
    that the sum contains it once, whatever w is. A term that guides away from the null prompt, such
    as :class:`CFG`, replaces the pipeline's own guidance, also at steps outside the term's
    interval. ``guidance_scale`` must then be above 1, so that the pipeline brings a null prompt,
    and has no other effect. A term whose scale is off does nothing.

    ``max_rows`` bounds the rows evaluated at once. ``seed`` keys the randomness of terms that draw.
    An interval counts the evaluations of one call of the pipeline. When the context ends, also
    after an exception, the pipeline is as it was.

    Raises:
        ValueError: the pipeline, its network or its scheduler is not known, or a term cannot guide
            it; the message lists what is known.

    Example::

        with guide(pipe, SAG(0.75)):
            image = pipe("a corgi").images[0]
    """
    return Guiding(_guided(pipe, terms, max_rows, seed))


@contextmanager
def _guided(pipe: P, terms: tuple[Term, ...], max_rows: int | None, seed: int) -> Iterator[P]:
    # Refuse what cannot be guided before the pipeline is touched.
    family = pipelines_of(pipe)
    for term in terms:
        if not isinstance(term, Term):
            raise ValueError(f"{term!r}: expected a term, as in guide(pipe, SAG(0.75), PAG(1.0))")
        if family.own_cfg == "apart" and term.from_null and not term.off:
            raise ValueError(
                f"{type(term).__name__}: {type(pipe).__name__} asks for the null prompt in a call "
                f"of its own, after that for the prompt; use its true_cfg_scale and "
                f"negative_prompt instead"
            )
    # From here on, calls of the pipeline and of its network come to the guided one.
    guided = _GuidedPipeline(pipe, family, terms, max_rows, seed)
    with called(pipe, guided.call_pipeline), called(guided.found, guided.call_network):
        yield pipe


@dataclass(frozen=True)
class Call:
    """A call of a network: x_t in its form, the time, and all else, which is the condition.

    Example::

        call = Call.of(inspect.signature(type(network).forward), network, layout, args, kwargs)
    """

    x: Tensor
    t: Tensor | float
    arguments: dict[str, Any]
    return_dict: bool

    @classmethod
    def of(
        cls,
        signature: inspect.Signature,
        network: nn.Module,
        layout: type[TextConditional],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Call:
        """Read a call by the signature of the network's ``forward``."""
        arguments = dict(signature.bind(network, *args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        del arguments["self"]
        return_dict = arguments.pop("return_dict", True)
        x, t = arguments.pop(layout.x_name), arguments.pop("timestep")
        return cls(x, t, arguments, return_dict)

    def formed(self, output: Tensor) -> Any:
        """Return an output in the form that was asked for."""
        if not self.return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)


@contextmanager
def called(found: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """Send calls of an object elsewhere until the context ends, by giving it a class of its own.

    Replacing its ``forward`` would not do: offloading replaces that at every call, and a compiled
    module does not look at it.
    """
    own = type(found)
    if "_sag_dit_guided" in vars(own):
        raise ValueError(
            f"this {own.__name__} is being guided already; give all terms to one guide(pipe, ...)"
        )

    # The context may be ended by what answers a call.
    open_ = True

    @wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # During the call it has its own class again, since torch.compile, for example, looks at it.
        object.__setattr__(self, "__class__", own)
        try:
            return instead(*args, **kwargs)
        finally:
            object.__setattr__(self, "__class__", guided if open_ else own)

    names = {"__call__": call, "_sag_dit_guided": True, "__module__": own.__module__}
    guided = type(own.__name__, (own,), {**names, "__qualname__": own.__qualname__})
    object.__setattr__(found, "__class__", guided)
    try:
        yield
    finally:
        open_ = False
        object.__setattr__(found, "__class__", own)


class _GuidedPipeline:
    """What answers the calls of the pipeline and of its network."""

    def __init__(
        self, pipe: Any, family: Pipelines, terms: tuple[Term, ...], max_rows: int | None, seed: int
    ) -> None:
        self.pipe = pipe
        self.family = family
        self.found = network_of(family, pipe)
        self.network: nn.Module = getattr(self.found, "_orig_mod", self.found)
        self.layout = layout_of(self.network)
        check_scheduler(pipe.scheduler)
        self.terms = terms
        self.max_rows = max_rows
        self.seed = seed
        self.signature = inspect.signature(type(self.network).forward)
        self.run: Run | None = None
        self.arguments: Mapping[str, Any] = {}

    def call_pipeline(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline itself, with terms that remember nothing of earlier calls."""
        bound = inspect.signature(self.pipe.__call__).bind(*args, **kwargs)
        bound.apply_defaults()
        check_scheduler(self.pipe.scheduler)
        # A cache may have been put in since.
        network_of(self.family, self.pipe)
        if any(term.renoises and not term.off for term in self.terms):
            check_renoising(self.pipe.scheduler, bound.arguments)
        own_cfg, terms = self.family.own_cfg, self.terms
        self.arguments = bound.arguments
        for term in terms:
            if term.on_guided and not term.off and bound.arguments.get("guidance_rescale"):
                raise ValueError(
                    f"guidance_rescale={bound.arguments['guidance_rescale']}: "
                    f"{type(term).__name__} acts on the guided prediction, which the pipeline "
                    f"would rescale later; set guidance_rescale=0, or give guide a CFG(rescale=...)"
                )
        self.run = Run(
            self.pipe, self.network, self.layout, own_cfg, terms, self.max_rows, self.seed
        )
        try:
            return self.pipe(*args, **kwargs)
        finally:
            self.run = None

    def call_network(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the network, guided where a term acts."""
        if self.run is None:
            raise ValueError(
                f"{type(self.network).__name__} was called from outside of its pipeline's call; "
                f"within guide(pipe, ...) call pipe(...) alone"
            )
        call = Call.of(self.signature, self.network, self.layout, args, kwargs)
        # Answer as the network does: its own answer where nothing acts, in the form asked for.
        cfg = own_cfg_scale(self.family, self.pipe, self.arguments)
        arguments = dict(self.layout.corrected(self.network, call.arguments, cfg is not None))
        output = self.run.output(call.x, call.t, arguments, cfg)
        if output is None:
            return self.found(call.x, timestep=call.t, return_dict=call.return_dict, **arguments)
        return call.formed(output)
