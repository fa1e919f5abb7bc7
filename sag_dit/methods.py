"""The guidance methods, read from their files without importing them.

A method is described once, in its class. The public names, the keys of the command line and the
defaults of its settings follow from that. This index reads the source of the classes, so that
``import sag_dit`` and ``--help`` do not import torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("guidance")
OF_ALL = ("interval", "interval_in", "schedule", "every")
"""Settings that every method has, beside its scale."""


@dataclass(frozen=True)
class Method:
    """What a method's file says of it.

    ``name`` is its class, in ``module``. ``settings`` are the defaults of its fields but the scale,
    as YAML writes them; settings that all methods have come last. Fields that only take Python
    objects, such as a network, are left out. ``remarks`` say what the settings mean.

    Example:
        >>> next(method for method in methods() if method.key == "cfg").neutral
        1.0
    """

    name: str
    module: str
    key: str
    title: str
    neutral: float
    settings: Mapping[str, Any]
    remarks: Mapping[str, str]


@cache
def methods() -> tuple[Method, ...]:
    """Return all guidance methods, in the order of their files; a class with a ``key`` is one.

    Raises:
        ValueError: a default of a setting is neither written out nor ``math.inf``.

    Example:
        >>> {method.key: method.name for method in methods()}["cfg"]
        'CFG'
    """
    classes: dict[str, tuple[str, ast.ClassDef]] = {}
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = (f"sag_dit.guidance.{file.stem}", node)
    return tuple(
        _method(name, module, classes)
        for name, (module, node) in classes.items()
        if any(ast.unparse(each).startswith("key = ") for each in node.body)
    )


def scales() -> dict[str, float]:
    """Return the keys of the methods' scales at the command line, each where it is off."""
    return {f"{method.key}_scale": method.neutral for method in methods()}


def guidance_defaults() -> dict[str, dict[str, Any]]:
    """Return a configuration's ``guidance``: for each method its class and its defaults."""
    return {
        method.key: {
            "_target_": f"sag_dit.guidance.{method.name}",
            "scale": f"${{{method.key}_scale}}",
            **method.settings,
        }
        for method in methods()
    }


Classes = Mapping[str, tuple[str, ast.ClassDef]]


def _lineage(name: str, classes: Classes) -> Iterator[ast.ClassDef]:
    """Yield a class and what it derives from in this package, the class itself last."""
    if name not in classes:
        return
    node = classes[name][1]
    for base in node.bases:
        yield from _lineage(ast.unparse(base), classes)
    yield node


def _method(name: str, module: str, classes: Classes) -> Method:
    """Return what a class says of itself, or inherits."""
    constants: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    lines = [each for node in _lineage(name, classes) for each in node.body]
    for each in lines:
        # A field, or what the class states of itself.
        match each:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                constants[target] = value
            case ast.AnnAssign(target=ast.Name(id=target), annotation=kind, value=value) if value:
                if "ClassVar" in ast.unparse(kind):
                    constants[target] = value
                elif target != "scale" and ast.unparse(kind) != "nn.Module | None":
                    defaults[target] = _value(value)
    return Method(
        name,
        module,
        key=_value(constants["key"]),
        title=_value(constants["title"]),
        neutral=float(_value(constants["neutral"])),
        settings={key: defaults[key] for key in sorted(defaults, key=OF_ALL.__contains__)},
        remarks=remarks(lines),
    )


def remarks(lines: Iterable[ast.stmt]) -> dict[str, str]:
    """Return what the sentences below the fields of a class say of them, by field."""
    found = {}
    for each, after in pairwise(lines):
        match each, after:
            case ast.AnnAssign(target=ast.Name(id=target)), ast.Expr(ast.Constant(str(remark))):
                found[target] = remark
    return found


def _value(node: ast.expr) -> Any:
    """Return a default as YAML writes it: a tuple is a list there."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        node = next(each.value for each in node.keywords if each.arg == "default")
    if ast.unparse(node) == "math.inf":
        return float("inf")
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"the default {ast.unparse(node)} in line {node.lineno}: expected a value that is "
            f"written out, for the configuration is made without importing the method"
        ) from None
    return list(value) if isinstance(value, tuple) else value
