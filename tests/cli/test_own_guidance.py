"""A method of one's own, from the file that docs/guidance.md shows, by ``_target_``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import ROOT, Command

PAGE = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")


def test_the_documented_dozen_lines_guide_a_run(
    sample: Command,
    contents: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", PAGE, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12 - 1  # a dozen, with room for a setting
    (tmp_path / "my_guidance.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    command = next(line for line in PAGE.splitlines() if "my_guidance.Sharpen" in line)
    program, arguments = command.split()[:5], command.split()[5:]
    assert program == ["python", "-m", "sag_dit", "sample", "sag_scale=0"]
    assert len(arguments) == 2

    outcome = sample("num_images=1", "sag_scale=0", *arguments)
    assert "cost: 2 x unguided, " in outcome.out
    record = yaml.safe_load((outcome.folder() / "config.yaml").read_text(encoding="utf-8"))
    assert record["settings"]["guidance"] == {
        "sharpen": {"term": "my_guidance.Sharpen", "scale": 0.5, "interval": [0.0, 1.0]}
    }
    assert record["config"]["cost"]["rows_per_step"] == 2
    files = contents(outcome.folder())
    assert files["images/000000.png"] != files["unguided/000000.png"]
    together = ("gallery.num=0", "sag_scale=0.5", "cfg_scale=1.5", "pag_scale=0.3")
    shared = sample("num_images=1", *together, *arguments)
    assert "cost: 5 x unguided, " in shared.out
