"""Files changed at random, as ``make fuzz`` changes many more: each is read or refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz


def test_changed_files_of_every_kind_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as fuzzing sets it, and only here
    failures, read = fuzz.fuzz(300, seed=12)
    assert failures == {}
    assert len(read) == 31 and sum(read.values()) == 300


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux alone")


def broken(_: Path) -> object:
    raise KeyError("index")


def greedy(_: Path) -> object:
    return bytearray(fuzz.MEMORY + (32 << 20))


def running(_: Path) -> object:
    return exec("1 + 1")


def writing(folder: Path) -> object:
    return (folder / "left.txt").write_text("here")


def refusing(_: Path) -> object:
    raise ValueError("no such key")


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (broken, "KeyError"),
        pytest.param(greedy, "MB more", marks=LINUX),
        (running, "code ran"),
        (writing, "for writing"),
        (refusing, None),
    ],
)
def test_what_goes_wrong_is_seen(
    read: Callable[[Path], object], told: str | None, tmp_path: Path
) -> None:
    kind = fuzz.Kind(tmp_path, "some.json", read)
    found = fuzz.failure(kind, tmp_path, 10, fuzz.Watch())
    assert (found is None) if told is None else (found is not None and told in found)


def test_values_are_changed_within_json_lines_and_yaml() -> None:
    drawn = random.Random(0)
    honest: dict[str, Any] = {"a": [1, 2], "b": {"c": 3}}
    for text in (json.dumps(honest), json.dumps(honest, indent=1), "a: [1, 2]\nb: {c: 3}\n"):
        changed = {fuzz.changed_text(text, drawn) for _ in range(50)}
        assert len(changed) > 10
    lines = fuzz.changed_text('{"a": 1}\n{"a": 2}', drawn)
    assert lines.count("\n") == 1
