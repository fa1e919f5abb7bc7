"""What classes and functions take by name, read from their files without importing them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sag_dit.methods import methods


@cache
def names_taken(target: str) -> frozenset[str] | None:
    """Return what a class or function takes by name; None if its file does not tell.

    So it is with what takes anything, and with what is not written out under this name.

    Example:
        >>> sorted(names_taken("sag_dit.sampler.DDIM"))
        ['eta']
    """
    module, _, name = target.rpartition(".")
    if module == "sag_dit.guidance":
        # Its classes are named by the index of methods.
        module = {each.name: each.module for each in methods()}.get(name, module)
    for node in _statements(module):
        match node:
            case ast.ImportFrom(module=str(source), level=0, names=names):
                for each in names:
                    if name == (each.asname or each.name):
                        return names_taken(f"{source}.{each.name}")
            case ast.FunctionDef() if node.name == name:
                return _parameters(node)
            case ast.ClassDef() if node.name == name:
                return _of_class(node, module)
    return None


def names_along(kind: type[object]) -> frozenset[str]:
    """Return what the constructor of an imported class names, and those of bases that it reaches.

    It reaches the next one where it takes ``**options``.

    Example:
        >>> class Base:
        ...     def __init__(self, width=1): ...
        >>> class Mine(Base):
        ...     def __init__(self, depth=2, **options): ...
        >>> sorted(names_along(Mine))
        ['depth', 'width']
    """
    named: set[str] = set()
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named |= {one.name for one in parameters if one.kind not in variable}
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    return frozenset(named)


def _statements(module: str) -> Iterator[ast.stmt]:
    top, *rest = module.split(".")
    # Of a package alone, so that nothing is imported.
    found = find_spec(top) if top else None
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, *rest)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():
            yield from ast.parse(file.read_text(encoding="utf-8")).body


def _parameters(node: ast.FunctionDef) -> frozenset[str] | None:
    listed = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return None if node.args.kwarg else frozenset(each.arg for each in listed) - {"self"}


def _of_class(node: ast.ClassDef, module: str) -> frozenset[str] | None:
    """Return what a class takes: of its own ``__init__``, or of its fields, or as its bases."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _parameters(each)
    bases = [names_taken(f"{module}.{ast.unparse(each)}") for each in node.bases]
    known = [each for each in bases if each is not None]
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return known[0] if known else None
    own = (each for each in node.body if isinstance(each, ast.AnnAssign))
    named = {
        ast.unparse(each.target) for each in own if "ClassVar" not in ast.unparse(each.annotation)
    }
    return frozenset(named - {"_"}).union(*known)
