"""What the controls say, as the arguments of the Python API and as a recipe to copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import import_module
from typing import Any

from sag_dit.api import LoadedModel, with_models
from sag_dit.guidance import SAG, Term
from sag_dit.methods import Method, methods
from sag_dit.output.telling import Recipe
from sag_dit.process import Process
from sag_dit.sampler import Sampler, named
from sag_dit.traces import Maps

AS_SAG = "as SAG"
"""The choice of the layer whose attention is shown: the one that SAG reads."""


Ready = Callable[[Mapping[str, Term]], dict[str, Term]]
"""Loads the models that methods name, as :func:`sag_dit.api.with_models` does."""


class RefusedError(ValueError):
    """Settings that cannot work; ``method`` is the key of the method, or ``sampler``, that says so.

    Example:
        >>> RefusedError("interval=(1, 0): the wrong way round", "sag").method
        'sag'
    """

    def __init__(self, told: str, method: str = "") -> None:
        super().__init__(told)
        self.method = method


def class_of(method: Method) -> type[Term]:
    """Return the class of a method."""
    found: type[Term] = getattr(import_module(method.module), method.name)
    return found


def option_names(sampler: Any) -> set[str]:
    """Return the names of a sampler's options: its fields with a default."""
    return {each.name for each in fields(sampler) if each.default is not MISSING}


@dataclass(frozen=True)
class Asked:
    """What is asked for: one class or prompt, drawn ``count`` times from noise of its own.

    ``guidance`` holds the settings of every method by its key, in the order in which their
    contributions are added. ``options`` are those of samplers; each sampler takes the ones that it
    has. ``layer`` is the self-attention layer whose attention is shown.

    Example:
        >>> asked = Asked("digits", "3", guidance={"sag": {"scale": 0.5}, "cfg": {"scale": 1.0}})
        >>> list(asked.terms())
        ['sag']
    """

    ckpt: str
    label: str
    prompt: str | None = None
    count: int = 1
    seed: int = 0
    steps: int = 20
    sampler: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer: str = AS_SAG

    def terms(self) -> dict[str, Term]:
        """Return the methods that are on.

        Raises:
            RefusedError: a method does not take its settings.
        """
        kinds = {method.key: class_of(method) for method in methods()}
        terms = {}
        for key, settings in self.guidance.items():
            try:
                term = kinds[key](**settings)
            except (ValueError, TypeError) as error:
                raise RefusedError(str(error), key) from error
            if not term.off:
                terms[key] = term
        return terms

    def solver(self, process: Process) -> Sampler:
        """Return the sampler with its options.

        Raises:
            RefusedError: it does not take them, or not the process or the number of steps.
        """
        try:
            chosen: Any = named(self.sampler, process)
            own = {
                name: each for name, each in self.options.items() if name in option_names(chosen)
            }
            made: Sampler = replace(chosen, **own)
            made.check(process, self.steps)
        except (ValueError, TypeError) as error:
            raise RefusedError(str(error), "sampler") from error
        return made

    def checked(self, model: LoadedModel, ready: Ready = with_models) -> dict[str, Term]:
        """Return the methods that are on, each fit to guide the model.

        ``ready`` loads the models that methods name.

        Raises:
            RefusedError: one cannot guide it, or the sampler refuses.
        """
        terms: dict[str, Term] = {}
        solver = self.solver(model.denoiser.process)
        for key, term in self.terms().items():
            try:
                terms |= ready({key: term})
                terms[key].check(model.denoiser)
                terms[key].check_sampler(solver)
            except ValueError as error:
                raise RefusedError(str(error), key) from error
        return terms

    def drawing(self, model: LoadedModel, ready: Ready = with_models) -> dict[str, Any]:
        """Return the arguments of :meth:`LoadedModel.sample` and :meth:`LoadedModel.watch`.

        Raises:
            RefusedError: a method cannot guide the model, or the sampler refuses.
        """
        return {
            "classes": [0 if self.prompt is not None else self.label] * self.count,
            "guidance": list(self.checked(model, ready).values()),
            "sampler": self.solver(model.denoiser.process),
            "steps": self.steps,
            "seed": self.seed,
            # As many rows as are shown, so that a picture is there soon.
            "batch_size": self.count,
        }

    def maps(self, model: LoadedModel, terms: Mapping[str, Term]) -> Maps | bool:
        """Return which attention to keep: of one layer at every step; False if there is none."""
        if not model.denoiser.layers:
            return False
        sag = next((term for term in terms.values() if isinstance(term, SAG)), SAG())
        own = tuple(layer.name for layer in sag.layers(model.denoiser))
        layers = own if self.layer in (AS_SAG, None, "") else (self.layer,)
        # Samplers with two evaluations in a step have twice as many.
        return Maps(layers=layers, steps=2 * self.steps, query=None, limit=sag)

    def recipe(self, model: LoadedModel) -> Recipe:
        """Return the same as what somebody would type."""
        return Recipe(
            ckpt=self.ckpt,
            sampler=self.solver(model.denoiser.process),
            steps=self.steps,
            seed=self.seed,
            guidance=self.terms(),
            num_classes=len(model.class_names),
            classes=None if self.prompt is not None else [self.label],
            num_images=self.count,
            prompt=self.prompt,
            batch_size=self.count,
            loading=model.loading,
        )

    def changed(self, path: str, value: Any) -> Asked:
        """Return the same with one key changed: ``steps``, ``sampler.eta``, ``sag.interval.0``, ...

        Example:
            >>> asked = Asked("digits", "3", guidance={"sag": {"interval": (0.0, 1.0)}})
            >>> asked.changed("sag.interval.1", 0.5).guidance["sag"]["interval"]
            (0.0, 0.5)
        """
        key, _, setting = path.partition(".")
        if not setting:
            return replace(self, **{key: value})
        if key == "sampler":
            return replace(self, options={**self.options, setting: value})
        setting, _, place = setting.partition(".")
        if place:
            bounds = list(self.guidance[key][setting])
            bounds[int(place)] = value
            value = tuple(bounds)
        method = {**self.guidance[key], setting: value}
        return replace(self, guidance={**self.guidance, key: method})
