"""Count what keeps the package simple: ``python -m benchmarks.counts`` (``--list``: where).

The table in docs/architecture.md has these figures. All follow from the source, which is read and
not imported. How many files a new method touches is counted by writing one, and is not in here.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "sag_dit"
LONG = 30
"""Lines from which on a function needs step headings."""

Sources = Mapping[str, str]
"""The text of each file, by its path within the package."""
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources(package: Path = PACKAGE) -> Sources:
    """Return the package's files."""
    return {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }


def _lines(node: ast.stmt) -> range:
    """Return the numbers of the lines on which a statement stands."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold code: no comment, no docstring, not empty."""
    # A string that stands alone documents what it follows.
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            documented.update(_lines(node))
    # What is left are the lines on which a token of the grammar stands.
    found: set[int] = set()
    layout = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.COMMENT}:
            found.update(range(token.start[0], token.end[0] + 1))
    return found - documented


def comment_lines(text: str) -> set[int]:
    """Return the numbers of the lines with a comment that speaks to the reader, not to a tool."""
    return {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and not token.string.startswith(("# noqa", "# type:", "# pragma", "# fmt:"))
    }


def with_config_objects(files: Sources) -> list[str]:
    """Return the files that name DictConfig or OmegaConf."""
    return [path for path, text in files.items() if "DictConfig" in text or "OmegaConf" in text]


def long_without_comment(files: Sources) -> list[str]:
    """Return the functions of :data:`LONG` lines or more, docstring aside, without any comment."""
    found = []
    for path, text in files.items():
        comments = comment_lines(text)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = _lines(node)
            undocumented = len(lines) - len(_lines(node.body[0])) * bool(ast.get_docstring(node))
            if undocumented >= LONG and comments.isdisjoint(lines):
                found.append(f"{path}:{node.lineno} {node.name}, {undocumented} lines")
    return found


def _top(body: list[ast.stmt]) -> Iterator[Definition]:
    """Yield a module's own classes and functions, those within an ``if`` or ``try`` too."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _top([*node.body, *node.orelse])


def same_names(files: Sources, public: bool = False) -> list[str]:
    """Return the top-level classes and functions of one name in several files."""
    places: defaultdict[str, set[str]] = defaultdict(set)
    for path, text in files.items():
        for node in _top(ast.parse(text).body):
            if not (public and node.name.startswith("_")):
                places[node.name].add(path)
    return [
        f"{name}: {', '.join(sorted(paths))}"
        for name, paths in sorted(places.items())
        if len(paths) > 1
    ]


def lines_of_cli(files: Sources) -> int:
    """Return how many lines ``cli/`` has, comments and docstrings included."""
    return sum(len(text.splitlines()) for path, text in files.items() if path.startswith("cli/"))


def lines_of_code(files: Sources) -> int:
    """Return how many lines of code the package has."""
    return sum(len(code_lines(text)) for text in files.values())


ROWS: Mapping[str, Callable[[Sources], int | list[str]]] = {
    "files that name DictConfig or OmegaConf": with_config_objects,
    "lines of cli/": lines_of_cli,
    "lines of code, comments and docstrings not counted": lines_of_code,
    "top-level classes and functions of one name in several files": same_names,
    "of these, public": lambda files: same_names(files, public=True),
    f"functions of {LONG} lines or more without a comment": long_without_comment,
}


def main() -> None:
    """Print the figures as a table in Markdown, with ``--list`` what was counted too."""
    parser = argparse.ArgumentParser(description="Count what keeps the package simple.")
    parser.add_argument("--list", action="store_true", help="say also where each one stands")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="another copy of sag_dit/")
    arguments = parser.parse_args()
    files = sources(arguments.package)
    print("| what | now |\n|---|---|")
    found = {what: count(files) for what, count in ROWS.items()}
    for what, value in found.items():
        number = value if isinstance(value, int) else len(value)
        print(f"| {what} | {number:,} |")
    for what, value in found.items() if arguments.list else ():
        if not isinstance(value, int):
            print(f"\n{what}:", *value, sep="\n  ")


if __name__ == "__main__":
    main()
