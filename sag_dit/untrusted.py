"""Text files that may come from anywhere: JSON, JSON lines, YAML and CSV, read within limits.

Whatever a file holds, reading it comes to an end, takes memory in proportion to its size, and runs
no code. Whatever is wrong with it is a ValueError of one sentence that names the file. A schema
says what the values have to be; see :mod:`sag_dit.bounds`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sag_dit.bounds import checked

if TYPE_CHECKING:
    import yaml

Schema = TypeVar("Schema")

SIZE = 32 << 20
"""Bytes of a text file that is read as a whole, and of a line of one that is not."""
VALUES = 500_000
"""Values in a file of JSON, whose reader makes some hundred bytes of two."""
YAML_VALUES = 100_000
"""Values in a file of YAML, aliases written out; its reader makes a kilobyte of each."""
DEPTH = 64
"""How deep mappings and lists may lie within each other."""
DIGITS = 4_000
"""The most characters of a number."""


def read_text(file: Path, most: int = SIZE) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, has more than ``most`` bytes, or is not UTF-8.
    """
    try:
        size = file.stat().st_size
        if size > most:
            raise ValueError(
                f"{file}: {size / 1e6:,.0f} MB: expected a text file of at most "
                f"{most / 1e6:,.0f} MB"
            )
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def _not_utf8(file: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{file}: byte {error.start} is no UTF-8: expected a text file in UTF-8; save it as such"
    )


def parse_json(text: str, where: object, most: int = VALUES) -> Any:
    """Return the values of a JSON text; errors begin with ``where``, the file or line it is from.

    Raises:
        ValueError: it is no JSON, nested too deep, has more than ``most`` values, or text that no
            file can hold.
    """
    values = 1 + sum(map(text.count, ",[{"))
    if values > most:
        raise ValueError(f"{where}: some {values:,} values: expected at most {most:,}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise ValueError(f"{where}: expected a readable JSON file ({error})") from None
    _check_values(found, where, 0)
    return found


def _check_values(value: Any, where: object, depth: int) -> None:
    """Refuse what is nested too deep, and half characters, which cannot be printed or written."""
    if depth > DEPTH:
        raise _too_deep(where)
    if isinstance(value, dict):
        for name, each in value.items():
            _check_values(name, where, depth + 1)
            _check_values(each, where, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_values(each, where, depth + 1)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: {value!r:.60} holds half a character: expected text that can be written"
            ) from None


def _too_deep(where: object) -> ValueError:
    return ValueError(
        f"{where}: nested too deep: expected at most {DEPTH} mappings and lists within each other"
    )


def read_json(file: Path, most: int = SIZE) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    value = parse_json(read_text(file, most), file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_json_as(file: Path, schema: type[Schema], *, open: bool = False) -> Schema:
    """Read a JSON object as an instance of its schema, see :func:`sag_dit.bounds.checked`.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    return checked(read_json(file), schema, str(file), open=open)


def read_json_lines(file: Path, schema: type[Schema]) -> Iterator[Schema]:
    """Yield the lines of a file as instances of their schema; keys it does not have are left out.

    Raises:
        ValueError: the file cannot be read, or a line is something else.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(SIZE), b""), start=1):
                where = f"{file}, line {number}"
                if line.strip():
                    yield checked(parse_json(_text(line, file), where), schema, where, open=True)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None


def _text(line: bytes, file: Path) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a mapping of plain values from YAML; an empty file is an empty mapping.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    import yaml

    text = read_text(file, SIZE // 8)
    # libyaml reads ten times as fast, but nests calls in C; so depth is seen to first.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader), file)
    except yaml.YAMLError as error:
        raise _no_yaml(file, error) from None
    try:
        value = yaml.load(text, Loader=loader)
    except Exception as error:  # what is no date, no number or no key raises almost any type
        raise _no_yaml(file, error) from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a mapping, found a {type(value).__name__}")
    return value


def _no_yaml(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{file}: expected a readable YAML file ({reason})")


def _check_events(events: Iterator[yaml.Event], file: Path) -> None:
    """Refuse YAML that is too deep, or grows too large once its aliases are written out."""
    import yaml

    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = [(None, 0)]
    for event in events:
        # A value counts one and what is in it; an alias what it stands for.
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(
                    f"{file}: *{event.anchor} stands within itself or for nothing: expected an "
                    f"alias of what came before"
                )
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 1))
            if len(opened) > DEPTH:
                raise _too_deep(file)
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            # YAML counts in sixties too, in time that grows with the square of the length.
            if event.implicit[0] and len(event.value) > DIGITS and ":" in event.value:
                raise ValueError(f"{file}: {event.value[:20]}...: expected it in quotation marks")
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = size
        else:
            continue
        # What holds the value has grown by it.
        anchor, before = opened[-1]
        opened[-1] = (anchor, before + size)
        if before + size > YAML_VALUES:
            raise ValueError(
                f"{file}: more than {YAML_VALUES:,} values, its aliases written out: expected fewer"
            )


def csv_rows(reader: Any, file: str | Path) -> Iterator[list[str]]:
    """Yield the rows of a ``csv.reader``.

    Raises:
        ValueError: a line is no row.
    """
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: no row of CSV ({error})") from None
