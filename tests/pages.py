"""The files and commands that a page of docs/ shows, written and run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Page:
    """The text of a page, or of one of its sections."""

    text: str

    @classmethod
    def of(cls, name: str) -> Page:
        """A page of docs/."""
        return cls((ROOT / "docs" / name).read_text(encoding="utf-8"))

    def section(self, heading: str) -> Page:
        """What stands below a heading of the second level."""
        return Page(self.text.split(f"\n## {heading}\n")[1].split("\n## ")[0])

    @cached_property
    def files(self) -> dict[str, str]:
        """The Python files whose name is their first line."""
        found = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", self.text, re.DOTALL)
        return dict(found)

    @cached_property
    def blocks(self) -> list[list[str]]:
        """The commands of each block of shell."""
        found = re.findall(r"```bash\n(.*?)```", self.text, re.DOTALL)
        return [block.splitlines() for block in found]

    @property
    def commands(self) -> list[str]:
        """The commands of all blocks."""
        return [command for block in self.blocks for command in block]

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def run(arguments: Sequence[str], folder: Path) -> str:
    """Run Python in a process of its own, as in a reader's folder, and return its stdout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout
