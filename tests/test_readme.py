"""Every command of the README is run; published weights are stood in for by small files.

The stand-ins have the official names and format, and runs are cut to a few steps and images.
`make sample` and `make test` are run by CI itself.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from sag_dit.cli import app, export, sample, train
from sag_dit.models import DiT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()
]
SHORT = ["steps=2", "num_images=2", "batch_size=2"]
BY_CI = {"make sample", "make test"}


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files under the names that the README uses."""
    torch.manual_seed(0)
    network = DiT(8, 2, 3, 64, 2, 1, num_classes=1000)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.02)
    names = ("my_dit.pt", "DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
    for name in names:
        torch.save(network.state_dict(), tmp_path / name)
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """Run one command line of the README in this process, shortened."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    if script == "sample.py":
        app.launch("sample", sample.run, [*arguments, *SHORT])
    elif script == "train.py":
        app.launch("train", train.run, [*arguments, "max_steps=4"])
    elif script == "export.py":
        app.launch("export", export.run, arguments)
    else:
        raise AssertionError(f"{script}: the README names a script that this test cannot run")


def only(part: str) -> str:
    """Return the one command that contains ``part``."""
    (command,) = [command for command in COMMANDS if part in command]
    return command


TRAINING, FROM_RUN = only("train.py"), only("outputs/train/digits-HASH")
TWO_RANKS, EXPORT = only("trainer.devices=2"), only("export.py")
OTHERS = BY_CI | {TRAINING, FROM_RUN, TWO_RANKS, EXPORT}


def test_the_readme_names_commands() -> None:
    assert len(COMMANDS) > 8
    assert set(COMMANDS) >= BY_CI


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OTHERS))
def test_sampling_commands(
    command: str, workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command)
    printed = capsys.readouterr().out
    assert Path(printed.split("gallery: ")[1].strip()).is_file()


def test_training_then_sampling(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(TRAINING)
    folder = capsys.readouterr().out.split("run: ")[1].strip()
    run(FROM_RUN.replace("outputs/train/digits-HASH", folder))
    assert "gallery: " in capsys.readouterr().out


def test_export(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXPORT)
    assert Path(capsys.readouterr().out.split("export: ")[1].strip()).is_file()


def test_ci_runs_the_command_of_two_ranks() -> None:
    """Lightning starts the second rank from the command line, so CI runs this one as it stands."""
    assert TWO_RANKS.removeprefix("python ") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_python_example(workshop: Path) -> None:
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    names: dict[str, object] = {}
    exec(code.replace("steps=50", "steps=2"), names)
    images = names["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (2, 1, 8, 8)
