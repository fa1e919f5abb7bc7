"""The controls of the studio, derived from the methods: no list of them is kept here."""

from __future__ import annotations

import ast
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from textwrap import dedent
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gradio as gr

from sag_dit.bounds import parts
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.perturbed import layers_of
from sag_dit.guidance.term import RAMPS
from sag_dit.methods import Method, methods, remarks
from sag_dit.sampler import Sampler, own_samplers
from sag_dit.studio.asking import RefusedError, class_of, option_names

SPAN = 5.0
"""How far the slider of a scale goes beyond where the method is off."""
WIDE = 15.0
"""How far that of a method goes that guides away from the null condition."""
LIMITS = {"progress": 1.0, "t": 1000.0, "sigma": 100.0}
"""How far the sliders of an interval go, by its unit."""

Kind = Literal["scale", "number", "whole", "layers", "choice", "switch", "text"]


def slider(least: float, most: float, value: float, **about: Any) -> Any:
    """Return a slider whose number may be deleted: then it holds None, and is asked for in words.

    Example:
        >>> slider(1, 100, 20, label="steps").preprocess(None) is None
        True
    """
    made: Any = gr.Slider(least, most, value, **about)
    read = made.preprocess
    # No subclass: Gradio writes a stub beside the file that holds one.
    made.preprocess = lambda held: None if held is None else read(held)
    return made


@dataclass(frozen=True)
class Knob:
    """One setting of one method, or of samplers, and how it is shown.

    ``interval`` is two of them, ``interval.0`` and ``interval.1``.

    Example:
        >>> next(knob for knob in knobs(("sag",)) if knob.name == "layer").kind
        'layers'
    """

    method: str
    name: str
    kind: Kind
    default: Any
    told: str = ""
    choices: tuple[Any, ...] = ()
    optional: bool = False
    most: float = 1.0
    neutral: float = 0.0

    @property
    def path(self) -> str:
        """Its key at the command line, behind ``guidance.``."""
        return f"{self.method}.{self.name}"

    @property
    def settled(self) -> str:
        """The name of the field that it sets."""
        return self.name.partition(".")[0]

    def component(self, visible: bool = True) -> Any:
        """Return the component that shows it."""
        name = self.name.replace("_", " ")
        about: dict[str, Any] = {
            "label": {"interval.0": "from", "interval.1": "until"}.get(self.name, name),
            "info": self.told or None,
            "elem_id": self.path.replace(".", "-"),
            "interactive": True,
            "min_width": 120,
            "visible": visible,
        }
        shown = self.shown(self.default)
        if self.kind == "scale":
            within = self.name.startswith("interval")
            least = 0.0 if within else min(0.0, self.default)
            step = 0.01 if within else 0.05
            return slider(least, self.most, shown, step=step, buttons=[], **about)
        if self.kind in ("number", "whole"):
            finely = {"precision": 0} if self.kind == "whole" else {"step": 0.1}
            return gr.Number(value=shown, **finely, **about)
        if self.kind == "layers":
            return gr.Dropdown(["auto"], value=shown, multiselect=True, **about)
        if self.kind == "choice":
            return gr.Dropdown([*self.choices], value=shown, **about)
        if self.kind == "switch":
            return gr.Checkbox(value=shown, **about)
        return gr.Textbox(value=shown, max_lines=1, **about)

    def shown(self, value: Any) -> Any:
        """Return a value as its component takes it."""
        if self.kind == "layers":
            listed = [value] if isinstance(value, (str, int)) else [*value]
            return [str(each) for each in listed]
        if self.kind == "text":
            return "" if value is None else str(value)
        return value

    def read(self, value: Any) -> Any:
        """Return what a component holds as a term takes it.

        Raises:
            RefusedError: nothing, or no number, where a value is needed.
        """
        if self.kind == "layers":
            layers = [int(each) if each.lstrip("-").isdigit() else each for each in value or ()]
            return layers[0] if len(layers) == 1 else tuple(layers)
        if value in (None, "") and self.optional:
            return None
        if self.kind in ("scale", "number", "whole") or isinstance(self.default, float):
            try:
                return int(value) if self.kind == "whole" else float(value)
            except (TypeError, ValueError):
                told = f"{self.path}={value}: expected a number"
                raise RefusedError(told, self.method) from None
        if self.kind == "text" and str(value).startswith("["):
            try:
                return json.loads(value)
            except ValueError:
                told = f"{self.path}={value}: expected a list of numbers, such as [0, 3]"
                raise RefusedError(told, self.method) from None
        return value

    def parsed(self, text: str) -> Any:
        """Return a value that is written out as a term takes it.

        Raises:
            RefusedError: it cannot be read so.
        """
        if self.kind == "switch":
            if text not in ("true", "false"):
                raise RefusedError(f"{self.path}={text}: expected true or false", self.method)
            return text == "true"
        if text == "null" and self.optional:
            return None
        return self.read([text] if self.kind == "layers" else text)


@cache
def knobs(order: tuple[str, ...] = ()) -> tuple[Knob, ...]:
    """Return all settings of the methods, those in ``order`` first; scales lead each method.

    Example:
        >>> {knob.path for knob in knobs()} >= {"cfg.scale", "sag.threshold", "pag.interval.0"}
        True
    """
    known = {method.key: method for method in methods()}
    ordered = dict.fromkeys([*order, *known])
    return tuple(knob for key in ordered if key in known for knob in _knobs(known[key]))


def _knobs(method: Method) -> Iterator[Knob]:
    kind = class_of(method)
    hints = get_type_hints(kind)
    most = min(kind.most, method.neutral + (WIDE if kind.from_null else SPAN))
    for name in kind.strengths:
        told = kind.does if name == "scale" else method.remarks.get(name, "")
        default = method.settings.get(name, method.neutral)
        told = f"{told.rstrip('.')}; off at {method.neutral:g}" if name == "scale" else told
        yield Knob(method.key, name, "scale", default, told, most=most, neutral=method.neutral)
    # What every method has, then its own settings.
    start, stop = method.settings["interval"]
    yield Knob(method.key, "interval.0", "scale", start)
    yield Knob(method.key, "interval.1", "scale", stop)
    units = get_args(hints["interval_in"])
    yield Knob(method.key, "interval_in", "choice", "progress", choices=units)
    yield Knob(method.key, "schedule", "choice", "constant", choices=RAMPS)
    for name, default in method.settings.items():
        if name not in ("interval", "interval_in", "schedule", *kind.strengths):
            told = method.remarks.get(name, "")
            yield _knob(method.key, name, hints[name], default, told, name in kind.unbounded)


@cache
def sampler_knobs() -> tuple[Knob, ...]:
    """Return the options of samplers, each name once; what diffusers' have is in their names.

    Example:
        >>> [knob.path for knob in sampler_knobs() if knob.name == "eta"]
        ['sampler.eta']
    """
    found: dict[str, Knob] = {}
    for kind in own_samplers().values():
        hints, told = get_type_hints(kind), _option_remarks(kind)
        for each in fields(kind):  # type: ignore[arg-type]
            if each.name in option_names(kind):
                knob = _knob("sampler", each.name, hints[each.name], each.default,
                             told.get(each.name, ""))  # fmt: skip
                found.setdefault(each.name, knob)
    return tuple(found.values())


def _option_remarks(kind: type[Sampler]) -> dict[str, str]:
    classes = [each for each in reversed(kind.__mro__) if issubclass(each, Sampler)]
    sources = [ast.parse(dedent(inspect.getsource(each))).body[0] for each in classes]
    return remarks(line for each in sources if isinstance(each, ast.ClassDef) for line in each.body)


def _knob(
    method: str, name: str, hint: Any, default: Any, told: str, unbounded: bool = False
) -> Knob:
    kinds = parts(hint)
    optional = NoneType in kinds
    literal = next((get_args(each) for each in kinds if get_origin(each) is Literal), ())
    if name in ("layer", "layers"):
        return Knob(method, name, "layers", default, told)
    if literal:
        return Knob(method, name, "choice", default, told, literal, optional)
    if bool in kinds:
        return Knob(method, name, "switch", default, told)
    # Infinity, which no field for numbers holds, is written out.
    if (float in kinds and not unbounded) or int in kinds:
        kind: Kind = "number" if float in kinds else "whole"
        return Knob(method, name, kind, default, told, optional=optional)
    return Knob(method, name, "text", default, told, optional=optional)


def guidance(listed: Sequence[Knob], values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return what the controls say, by method and setting.

    Raises:
        RefusedError: a value that cannot be read.

    Example:
        >>> asked = guidance(knobs(), [knob.shown(knob.default) for knob in knobs()])
        >>> asked["sag"]["interval"]
        (0.0, 1.0)
    """
    found: dict[str, dict[str, Any]] = {}
    for knob, value in zip(listed, values, strict=True):
        settings = found.setdefault(knob.method, {})
        read = knob.read(value)
        if knob.settled == "interval":
            settings["interval"] = (*settings.get("interval", ()), read)
        else:
            settings[knob.settled] = read
    return found


def set_to(listed: Sequence[Knob], wanted: Mapping[str, Any], model: Denoiser) -> list[Any]:
    """Return updates that show the settings of ``wanted``, a configuration's ``guidance``.

    What it does not state is at its default; methods that it does not have are off. Layers are
    those of the ``model``.
    """
    updates = []
    for knob in listed:
        stated = wanted.get(knob.method) or {}
        value = stated.get(knob.settled, knob.default)
        if knob.settled == "interval" and knob.settled in stated:
            unit = stated.get("interval_in") or "progress"
            bound = value[int(knob.name[-1])]
            most = LIMITS[unit]
            value = bound if bound is not None else (0.0, most)[int(knob.name[-1])]
            updates.append(gr.update(value=value, maximum=max(most, value), **step_of(unit)))
        elif knob.kind == "scale":
            most = max(knob.most, math.ceil(1.5 * value))
            updates.append(gr.update(value=value, maximum=most))
        elif knob.kind == "layers":
            shown = [_layer_name(model, each) for each in knob.shown(value)]
            names = [*dict.fromkeys(["auto", *model.layers, *shown])]
            updates.append(gr.update(choices=names, value=shown))
        else:
            updates.append(gr.update(value=knob.shown(value)))
    return updates


def _layer_name(model: Denoiser, layer: str) -> str:
    """Return a layer as the model lists it; one that it does not have stays as it is called."""
    if layer == "auto":
        return layer
    try:
        return layers_of(model, int(layer) if layer.isdigit() else layer)[0].name
    except ValueError:
        return layer


def step_of(unit: str) -> dict[str, float]:
    """Return how finely the bounds of an interval are chosen in a unit."""
    return {"step": LIMITS[unit] / 100}
