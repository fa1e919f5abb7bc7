"""The examples in docstrings: those with ``>>>`` are run, of the others every call has to fit.

They need weights, files or a GPU, so they are compiled, and each call of something of this package
is compared with its signature.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "sag_dit"


def name_of(path: Path) -> str:
    """The name of a module by its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def public(path: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    """The public classes and functions of a file."""
    return [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]


def declares_keys(node: ast.ClassDef) -> bool:
    """Whether a class declares keys of a command: each says what it means, and ``--help`` shows."""
    return any(
        isinstance(each, ast.AnnAssign) and ast.unparse(each.value or node).startswith("key(")
        for each in node.body
    )


def exported() -> dict[str, Any]:
    """The functions that the package and its subpackages hand out, by their full names."""
    modules = [import_module(name_of(file)) for file in FILES if file.name == "__init__.py"]
    found = [
        getattr(each, name) for each in modules for name in getattr(each, "__all__", dir(each))
    ]
    own = (each for each in found if inspect.isfunction(each) and each.__name__[0] != "_")
    names = {f"{each.__module__}.{each.__qualname__}": each for each in own}
    return {name: each for name, each in names.items() if name.startswith("sag_dit.")}


FILES = sorted(PACKAGE.rglob("*.py"))
BLOCKS = [
    pytest.param(path, textwrap.dedent(block), id=f"{name_of(path)}-{node.name}")
    for path in FILES
    for node in public(path)
    for block in re.findall(
        r"^Example::\n\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", flags=re.MULTILINE
    )
]
WITH_OUTPUT = [name_of(path) for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


@cache
def homes() -> dict[str, str]:
    """The module of each public class and function of the package."""
    return {node.name: name_of(path) for path in FILES for node in public(path)}


def called(node: ast.expr, module: str, imported: dict[str, str]) -> Any:
    """What an expression calls of this package or a module; None for values such as ``denoise``.

    Raises:
        AttributeError: there is no such class, or no such name in ``sag_dit``.
    """
    name = ast.unparse(node)
    if name.startswith("sag_dit."):
        return reduce(getattr, name.split(".")[1:], import_module("sag_dit"))
    if not isinstance(node, ast.Name):
        return None
    for home in (imported.get(name), module, homes().get(name), "builtins"):
        if home is not None and hasattr(import_module(home), name):
            return getattr(import_module(home), name)
    if not name.islower():
        raise AttributeError(name)
    return None


def test_every_public_class_has_an_example() -> None:
    classes = [
        (f"{name_of(path)}: {node.name}", ast.get_docstring(node) or "")
        for path in FILES
        for node in public(path)
        if isinstance(node, ast.ClassDef) and not declares_keys(node)
    ]
    without = [name for name, text in classes if "\nExample:" not in text]
    assert len(classes) > 150
    assert without == []


def test_every_exported_function_has_an_example() -> None:
    functions = exported()
    without = [name for name, each in functions.items() if "\nExample:" not in inspect.getdoc(each)]
    assert len(functions) > 20
    assert without == []


@pytest.mark.parametrize("name", WITH_OUTPUT)
def test_what_an_example_prints_is_what_stands_there(name: str) -> None:
    failed, tried = doctest.testmod(import_module(name))
    assert tried and not failed


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_the_calls_of_an_example_fit(path: Path, block: str) -> None:
    if "yield" in block and "def " not in block:
        block = f"def contribution(ask):\n{textwrap.indent(block, '    ')}"
    tree = ast.parse(block)
    compile(tree, str(path), "exec")
    imported = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = called(node.func, name_of(path), imported)
        if function is not None and function.__module__ != "builtins":
            keywords = {each.arg: None for each in node.keywords if each.arg is not None}
            inspect.signature(function).bind(*node.args, **keywords)


def test_a_call_that_does_not_fit_is_found() -> None:
    for block, error in (
        ("CFG(1.5, strength=2)", TypeError),
        ("CGF(1.5)", AttributeError),
        ("sag_dit.draw(model)", AttributeError),
    ):
        with pytest.raises(error):
            test_the_calls_of_an_example_fit(PACKAGE / "guidance" / "cfg.py", block)
