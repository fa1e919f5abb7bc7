"""What a phase has measured, kept row by row, and the table made of it."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One figure: ``what`` was measured, under which setting, and what came."""

    phase: str
    what: str
    setting: str
    value: float | str
    unit: str = ""
    note: str = ""


class Rows:
    """Appends rows to a file of JSON lines, so that a phase that is killed keeps what it had.

    Attributes:
        failed: how many attempts have failed so far.
    """

    def __init__(self, file: Path, phase: str) -> None:
        self._file, self._phase = file, phase
        self.failed = 0

    @contextmanager
    def attempt(self, what: str, setting: str = "") -> Iterator[None]:
        """Keep an error in here as a row, so that what comes after is measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            said = " ".join(str(error).split())[:200]
            self.add(what, setting, f"failed: {type(error).__name__}: {said}")

    def add(
        self, what: str, setting: str, value: float | str, unit: str = "", note: str = ""
    ) -> None:
        """Keep one figure and print it."""
        row = Row(self._phase, what, setting, value, unit, note)
        append(self._file, row)
        print(f"  {what} | {setting} | {shown(value)} {unit} {note}".rstrip(), flush=True)


def append(file: Path, row: Row) -> None:
    """Write one row behind the others, all of it or nothing."""
    line = json.dumps(row._asdict()) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Row]:
    """Return the rows kept so far."""
    if not file.exists():
        return []
    return [Row(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]


def shown(value: float | str) -> str:
    """Write a figure with three significant digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(facts: Mapping[str, Any], titles: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Return the tables of all phases; a phase without rows says so."""
    lines = ["; ".join(f"{name}: {value}" for name, value in facts.items()), ""]
    for phase, title in titles.items():
        lines += [f"### {title}", "", "| what | setting | figure | |", "|---|---|---|---|"]
        of_phase = [row for row in rows if row.phase == phase]
        for row in of_phase:
            figure = f"{shown(row.value)} {row.unit}".strip()
            cells = (row.what, row.setting, figure, row.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if not of_phase:
            lines.append("| | | not measured | |")
        lines.append("")
    return "\n".join(lines)


def side_by_side(rows: Sequence[Row]) -> str:
    """Return a table of a line for each thing measured, with a column for each setting."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    lines = ["| what | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]
    for what in dict.fromkeys(row.what for row in rows):
        cells = {row.setting: row for row in rows if row.what == what}
        lines.append(f"| {what} | " + " | ".join(_cell(cells.get(s)) for s in settings) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{shown(row.value)} ({row.note})" if row.note else shown(row.value)
