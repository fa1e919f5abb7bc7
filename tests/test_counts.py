"""The figures of ``python -m benchmarks.counts``, on sources whose figures are known."""

from __future__ import annotations

from benchmarks import counts

FIRST = '''"""A file."""

# Why.
LIMIT = 3
"""What it bounds."""


def twice(x: int) -> int:  # noqa: ARG001
    """Return it twice.

    In two lines.
    """
    text = """a string
    that is code"""
    return 2 * x


class Box:
    pass


def _hidden() -> None: ...
'''
SECOND = """from omegaconf import DictConfig


class Box:
    def inner(self) -> None: ...


if LIMIT:

    def _hidden() -> None: ...
"""
FILES = {"first.py": FIRST, "cli/second.py": SECOND}


def test_code_is_what_is_neither_comment_nor_docstring() -> None:
    assert counts.lines_of_code({"first.py": FIRST}) == 8
    assert counts.lines_of_cli(FILES) == len(SECOND.splitlines())
    assert counts.with_config_objects(FILES) == ["cli/second.py"]


def test_names_are_compared_between_files_at_the_top_level() -> None:
    assert counts.same_names(FILES, public=True) == ["Box: cli/second.py, first.py"]
    assert [each.split(":")[0] for each in counts.same_names(FILES)] == ["Box", "_hidden"]


def test_a_long_function_needs_a_comment() -> None:
    def function(lines: int, first: str = "pass") -> str:
        body = [first, *["pass"] * (lines - 2)]
        return "\n    ".join(["def long() -> None:", *body]) + "\n"

    for text, expected in (
        (function(30), 1),
        (function(29), 0),
        (function(30, '"""A docstring."""'), 0),
        (function(30, "# What the first step does."), 0),
        (function(30, "pass  # noqa: S101"), 1),
        # A comment after the function is not in it.
        (function(30) + "# elsewhere\n", 1),
    ):
        assert len(counts.long_without_comment({"a.py": text})) == expected
