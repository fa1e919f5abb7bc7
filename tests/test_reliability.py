"""The page of promises names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_has_its_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 20
    missing, file = [], ""
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", row.split("|")[2])
        # A name alone is of the file before it.
        for path, test in named:
            file = path or file
            source = ROOT / file
            if not source.is_file() or (test and f"\ndef {test}(" not in source.read_text()):
                missing.append(f"{file}::{test}")
        if not any(path for path, _ in named):
            missing.append(row)
    assert missing == []
