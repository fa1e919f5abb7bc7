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
PARTS = (
    *("guidance", "process", "sampler", "attention", "pipelines", "evaluation", "data"),
    *("denoiser/prompts.py", "denoiser/text_conditional.py"),
    *("noise.py", "files.py", "tensors.py", "identity.py"),
    *("methods.py", "training/finetune.py", "training/resume.py"),
    *("training/sharding.py", "training/loggers.py", "training/objective"),
)
"""Where every public class has an example."""


def name_of(path: Path) -> str:
    """The name of a module by its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def documented(path: Path) -> list[tuple[str, str]]:
    """The public classes of a file, each with its docstring."""
    return [
        (node.name, ast.get_docstring(node) or "")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


FILES = sorted(PACKAGE.rglob("*.py"))
BLOCKS = [
    pytest.param(path, textwrap.dedent(block), id=f"{name_of(path)}-{name}")
    for path in FILES
    for name, text in documented(path)
    for block in re.findall(r"^Example::\n\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE)
]
WITH_OUTPUT = [name_of(path) for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


@cache
def homes() -> dict[str, str]:
    """The module of each public class and function of the package."""
    return {
        node.name: name_of(path)
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }


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
    parts = [PACKAGE / part for part in PARTS]
    files = [path for path in FILES if any(part in (path, *path.parents) for part in parts)]
    without = [
        f"{name_of(path)}: {name}"
        for path in files
        for name, text in documented(path)
        if "\nExample:" not in text
    ]
    assert len(files) > 50 and without == []


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
