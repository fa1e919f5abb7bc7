"""Text files that are made to harm are refused in one sentence, at once and in little memory."""

from __future__ import annotations

import csv
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from sag_dit.bounds import Bounds, Count, Natural, Share, checked
from sag_dit.untrusted import SIZE, csv_rows, parse_json, read_json_lines, read_text, read_yaml

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {x0: 1, y0: 2}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@dataclass
class Point:
    """A schema within another."""

    x: Natural
    y: Natural = 0


@dataclass
class Drawing:
    """A schema of all that schemas are made of."""

    width: Count
    title: str | None
    opacity: Share = 1.0
    kind: Literal["line", "area"] = "line"
    points: tuple[Point, ...] = ()
    origin: Point | None = None
    size: tuple[int, int] = (1, 1)
    named: Mapping[str, float | None] = field(default_factory=dict)
    tags: Annotated[Sequence[str], Bounds(pattern=r"\w+", expected="a list of words")] = ()


WHOLE: dict[str, Any] = {"width": 3.0, "title": None}


def test_a_schema_makes_instances_and_tuples_of_plain_values() -> None:
    more = {"points": [{"x": 1}], "origin": {"x": 0, "y": 2}, "size": [4, 5], "named": {"a": None}}
    made = checked(WHOLE | more, Drawing, "d.json")
    assert made == Drawing(
        3, None, points=(Point(1),), origin=Point(0, 2), size=(4, 5), named={"a": None}
    )
    assert isinstance(made.width, int)
    assert checked({**WHOLE, "later": 1}, Drawing, "d.json", open=True).title is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1], "d.json: expected a mapping, found a list"),
        ({"title": "a"}, "d.json: width is missing: expected a whole number, 1 to 2,147,483,648"),
        (WHOLE | {"colour": 1}, "d.json: colour is no key of it: expected width, title, "),
        (WHOLE | {"width": 0}, "d.json: width=0: expected a whole number, 1 to "),
        (WHOLE | {"width": 10**5000}, "width=a number of thousands of digits: expected a whole"),
        (WHOLE | {"width": True}, "width=true: expected a whole number"),
        (WHOLE | {"width": 2.5}, "width=2.5: expected a whole number"),
        (WHOLE | {"title": 3}, "title=3: expected text, or null"),
        (WHOLE | {"opacity": float("nan")}, "opacity=nan: expected a number, 0 to 1"),
        (WHOLE | {"kind": "dot"}, "kind=dot: expected one of line, area"),
        (WHOLE | {"points": [{"x": 1}, {"x": -1}]}, "points.1.x=-1: expected a whole number, 0 to"),
        (WHOLE | {"points": [3]}, "points.0=3: expected a mapping, found a int"),
        (WHOLE | {"points": 3}, "points=3: expected a list of mappings"),
        (WHOLE | {"origin": 3}, "origin=3: expected a mapping"),
        (WHOLE | {"origin": {}}, "origin.x is missing"),
        (WHOLE | {"size": [1]}, r"size=[1]: expected a list of 2 whole numbers"),
        (WHOLE | {"named": {"a": "b"}}, "named={a: b}: expected a mapping"),
        (WHOLE | {"tags": ["a b"]}, r"tags=[a b]: expected a list of words"),
        (WHOLE | {"title": ["long"] * 1000}, "title=[long,long"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(values: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(values, Drawing, "d.json")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deep: expected at most 64"),
        ("[" + "[]," * 600_000 + "[]]", "some 1,200,003 values: expected at most 500,000"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ("1" * 5000, "expected a readable JSON file"),
        ("{", "expected a readable JSON file"),
        ("", "expected a readable JSON file"),
    ],
)
def test_json_that_is_made_to_harm_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse_json(text, "some.json")
    assert str(caught.value).startswith("some.json: ") and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "more than 100,000 values, its aliases written out"),
        (MERGED, "more than 100,000 values, its aliases written out"),
        ("a: &a [1, *a]", "[*]a stands within itself"),
        ("&a {x: *a}", "[*]a stands within itself"),
        ("a: &a 1\nb: &a [*a]", "expected a readable YAML file"),
        ("a: *b", "[*]b stands within itself or for nothing"),
        ("[" * 100_000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("a: " + ":1" * 200_000, "expected it in quotation marks"),
        ("a: 1" + ":1" * 200_000, "expected it in quotation marks"),
        ("a: !!python/object/apply:os.system [true]", "expected a readable YAML file"),
        ("a: 2001-99-99", "expected a readable YAML file"),
        ("? [1]\n: 2", "expected a readable YAML file"),
        ("a: !!int x", "expected a readable YAML file"),
        ("a: \x00", "expected a readable YAML file"),
        ("- 1", "expected a mapping, found a list"),
    ],
)
def test_yaml_that_is_made_to_harm_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=told) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    assert time.monotonic() - began < 10


def test_aliases_of_an_honest_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: &a [1, 2]\nb: *a\nc: &c 3\nd: [*c, .inf]\n")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2], "c": 3, "d": [3, float("inf")]}
    file.write_text("")
    assert read_yaml(file) == {}


def test_text_is_read_within_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    file.write_bytes(b"\xef\xbb\xbfh\xc3\xa9")
    assert read_text(file) == "h\u00e9"
    file.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"text\.json: byte 3 is no UTF-8"):
        read_text(file)
    with file.open("wb") as stream:
        stream.truncate(SIZE + 1)  # which takes no room on disk
    with pytest.raises(ValueError, match=r"text\.json: 34 MB: expected .* at most 34 MB"):
        read_text(file)
    for strange in (tmp_path, tmp_path / "none", tmp_path / "\0"):
        with pytest.raises(ValueError, match=r"cannot be read|null"):
            read_text(strange)


def test_lines_name_their_number(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    file.write_text('{"x": 1, "z": "other"}\n\n{"x": 2}\n{"x": []}\n')
    lines = read_json_lines(file, Point)
    assert [next(lines), next(lines)] == [Point(1), Point(2)]
    with pytest.raises(ValueError, match=r"points\.jsonl, line 4: x=\[\]: expected a whole number"):
        next(lines)
    file.write_bytes(b'{"x": 1}\n\xff')
    with pytest.raises(ValueError, match=r"points\.jsonl: byte 0 is no UTF-8"):
        list(read_json_lines(file, Point))


def test_rows_that_are_no_csv_are_named() -> None:
    long = ["a,b\n", "c" * 200_000]
    with pytest.raises(ValueError, match=r"log\.csv, line 2: no row of CSV"):
        list(csv_rows(csv.reader(long), "log.csv"))
