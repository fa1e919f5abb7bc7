"""``python -m sag_dit``: the one entry to all commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sag_dit.checkpoints import zoo
from sag_dit.cli import main as entry
from sag_dit.cli.app import say
from sag_dit.cli.keys import COMMANDS
from tests.cli.conftest import ROOT


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sag_dit`` in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sag_dit", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_commands_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sag-dit", *arguments])
    entry.main()
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == {*COMMANDS, "models"}
    assert len(lines) == len(listed) + 2


def test_models_are_listed_with_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "DiT-XL-2-256x256.pt").touch()
    monkeypatch.setenv(zoo.WEIGHTS_FOLDER, str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "argv", ["sag-dit", "models"])
    entry.main()
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines() if line}
    assert {each.entry.name for each in zoo.listed()} <= set(lines)
    assert "MIT" in lines["digits"] and lines["digits"].endswith("model.safetensors")
    assert lines["DiT-XL-2"].endswith(str(tmp_path / "DiT-XL-2-256x256.pt"))
    assert lines["ADM-64"].endswith("not here: 64x64_diffusion.pt")
    assert f"{tmp_path}, " in told and zoo.WEIGHTS_FOLDER in told


def test_a_reader_may_take_the_beginning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        say("line\n" * 100_000)
        monkeypatch.undo()


def test_what_is_no_command_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "sampel")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: sampel: no such command")
    assert "sample" in done.stderr.splitlines()[1]


def test_ranks_are_started_alike(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    asked = ("num_images=3", "steps=2", "batch_size=1", "gallery.num=0", "trainer.accelerator=cpu")
    two = run(tmp_path, "sample", *asked, "trainer.devices=2", "out=two")
    assert two.returncode == 0, two.stderr
    one = run(tmp_path, "sample", *asked, "trainer.devices=1", "out=one")
    assert one.returncode == 0, one.stderr
    images = [contents(tmp_path / name / "images") for name in ("one", "two")]
    assert images[0] == images[1] and len(images[0]) == 3


def test_errors_help_and_sweeps_work_alike(tmp_path: Path) -> None:
    refused = run(tmp_path, "sample", "stepz=3")
    assert refused.returncode == 1 and "did you mean steps?" in refused.stderr.lower()
    assert "sag_scale" in run(tmp_path, "sample", "--help").stdout
    asked = ("num_images=1", "batch_size=1", "gallery.num=0", "trainer.accelerator=cpu")
    swept = run(tmp_path, "sample", "-m", "steps=1,2", *asked, "trainer.devices=1")
    assert swept.returncode == 0, swept.stderr
    assert len(list((tmp_path / "outputs" / "sample").iterdir())) == 2
