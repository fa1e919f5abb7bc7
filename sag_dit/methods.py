"""The guidance methods, read from their files without importing them.

A method says itself once, in its class: from what stands there follow the public names, the keys of
the command line and the defaults of its settings. This index reads the classes' source, so that
``import sag_dit`` and ``--help`` need no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("guidance")
OF_ALL = ("interval", "interval_in", "schedule")
"""Settings that every method has, beside its scale."""


@dataclass(frozen=True)
class Method:
    """What a method's file says of it.

    ``name`` is its class, in ``module``. ``settings`` are the defaults of its fields beside the
    scale, as YAML writes them; those that all methods have come last, and fields that take objects
    of Python alone, such as a network, are left out. ``remarks`` say what the settings mean.

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
    """Return all guidance methods, by the names of their files; a class with a ``key`` is one.

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
        Method(
            name,
            module,
            key=_value(own["key"]),
            title=_value(own["title"]),
            neutral=_neutral(name, classes),
            settings=_defaults(name, classes),
            remarks=_remarks(name, classes),
        )
        for name, (module, node) in classes.items()
        if "key" in (own := _constants(node))
    )


def scales() -> dict[str, float]:
    """Return the keys of the methods' scales at the command line, each where it is off."""
    return {f"{method.key}_scale": method.neutral for method in methods()}


def entries() -> dict[str, dict[str, Any]]:
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


def _constants(node: ast.ClassDef) -> dict[str, ast.expr]:
    """Return what a class states of itself, fields excepted."""
    found: dict[str, ast.expr] = {}
    for each in node.body:
        if isinstance(each, ast.Assign):
            target = each.targets[0]
        elif isinstance(each, ast.AnnAssign) and "ClassVar" in ast.unparse(each.annotation):
            target = each.target
        else:
            continue
        if isinstance(target, ast.Name) and each.value is not None:
            found[target.id] = each.value
    return found


def _lineage(name: str, classes: Classes) -> Iterator[ast.ClassDef]:
    """Yield a class and what it derives from in this package, the class itself last."""
    if name not in classes:
        return
    node = classes[name][1]
    for base in node.bases:
        yield from _lineage(ast.unparse(base), classes)
    yield node


def _neutral(name: str, classes: Classes) -> float:
    found = 0.0
    for node in _lineage(name, classes):
        constants = _constants(node)
        found = float(_value(constants["neutral"])) if "neutral" in constants else found
    return found


def _defaults(name: str, classes: Classes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in _lineage(name, classes):
        for each in node.body:
            if not (isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)):
                continue
            kind = ast.unparse(each.annotation)
            if "ClassVar" in kind or each.target.id == "scale" or each.value is None:
                continue
            if kind != "nn.Module | None":
                found[each.target.id] = _value(each.value)
    return {
        **{key: value for key, value in found.items() if key not in OF_ALL},
        **{key: found[key] for key in OF_ALL},
    }


def _remarks(name: str, classes: Classes) -> dict[str, str]:
    """Return the sentences that stand below fields, a class's own before those it derives from."""
    found: dict[str, str] = {}
    for node in _lineage(name, classes):
        for each, after in pairwise(node.body):
            match each, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=field)),
                    ast.Expr(value=ast.Constant(value=str(remark))),
                ):
                    found[field] = remark
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
