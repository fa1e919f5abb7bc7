"""docs/training.md: the commands of two sections are run, as a reader would, in few steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sag_dit.cli.schema import determining

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTIONS = ("Going on with changes", "Checkpoints and averages")
SMALL = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3", "data.batch_size=16")


def section(title: str) -> str:
    """The text below a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(title: str) -> list[str]:
    """The commands of a section, with a hundredth of their steps."""
    blocks = re.findall(r"```bash\n(.*?)```", section(title), re.DOTALL)
    lines = "".join(blocks).splitlines()
    fewer = [re.sub(r"max_steps=(\d+)00\b", r"max_steps=\1", each) for each in lines]
    return [re.sub(r"snapshot=\d+", "snapshot=1", each) for each in fewer]


@pytest.mark.slow  # each command is a process of its own, as a reader starts it
@pytest.mark.parametrize("title", SECTIONS)
def test_its_commands_run(title: str, tmp_path: Path) -> None:
    found = commands(title)
    assert len(found) >= 3
    for command in found:
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        small = [each for each in SMALL if each.split("=")[0] not in command]
        fresh = script == "train.py" and "ckpt=" not in command
        own = [*small, "every_n_steps.checkpoint=2"] if fresh else []
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments, *own],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stderr)
        if "resume_from" in command:
            assert "goes on from step 4 of first; what differs:" in done.stdout
            assert "data.batch_size: there 16, now 128" in done.stdout
    assert section(title).count("```bash") >= 2


def test_it_lists_all_that_may_change_within_a_run() -> None:
    text = section(SECTIONS[0]).split("**Within one run**")[1].split("\n\n")[0]
    told = set(re.findall(r"`([\w.]+)`", text)) - {"config.yaml", "changed"}
    keys = {key for key in determining("train", "nothing") if key != "out"}
    heads = {key for key in keys if not any(key.startswith(f"{other}.") for other in keys)}
    assert told == heads
