"""Every command of the README is run; published weights are stood in for by small files.

The stand-ins have the official names and format and lie in the folder that SAG_DIT_WEIGHTS names,
and runs are cut to a few steps and images.
`make sample` and `make test` are run by CI itself.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sag_dit.cli import app
from tests.stand_ins import save_dit, save_vae

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
BASH = [
    [line for line in text.splitlines() if line.strip()] for kind, text in BLOCKS if kind == "bash"
]
COMMANDS = [command for block in BASH for command in block]
WORKFLOWS = [block for block in BASH if block[0].startswith("python train.py ")]
"""Train, then sample from the run."""
SHORT = {
    "sample.py": ["steps=2", "num_images=2", "batch_size=2"],
    "train.py": ["max_steps=4"],
    "export.py": [],
}
"""What is added to a command of each script, so that it takes seconds."""
BY_CI = {"make sample", "make test"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files under the names of the published ones."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"):
        save_dit(folder / name, in_channels=4)
    save_vae(folder / "sd-vae-ft-ema")
    return folder


@pytest.fixture
def workshop(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the user's own that the README names."""
    save_dit(tmp_path / "my_dit.pt", in_channels=3)
    random = np.random.default_rng(0)
    for number in range(32):
        folder = tmp_path / "photos" / ("corgi", "tabby")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(weights))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """Run one command line of the README in this process, shortened."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    assert script in SHORT, f"{script}: the README names a script that this test cannot run"
    name = script.removesuffix(".py")
    module = importlib.import_module(f"sag_dit.cli.{name}")
    app.launch(name, getattr(module, f"run_{name}"), [*arguments, *SHORT[script]])


def only(part: str) -> str:
    """Return the one command that contains ``part``."""
    (command,) = [command for command in COMMANDS if part in command]
    return command


TWO_RANKS, EXPORT = only("trainer.devices=2"), only("export.py")
OTHERS = BY_CI | {TWO_RANKS, EXPORT}.union(*WORKFLOWS)


def test_the_readme_names_commands() -> None:
    assert len(COMMANDS) > 8
    assert set(COMMANDS) >= BY_CI
    assert {"digits", "finetune"} <= {
        recipe for command in COMMANDS for recipe in re.findall(r"experiment=(\w+)", command)
    }


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OTHERS))
def test_sampling_commands(
    command: str, workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command)
    printed = capsys.readouterr().out
    assert Path(printed.split("gallery: ")[1].strip()).is_file()


@pytest.mark.parametrize("commands", WORKFLOWS, ids=" ".join)
def test_training_then_sampling(
    commands: list[str], workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hash in the name of the run's folder is that of the folder which the run printed."""
    training, *samplings = commands
    run(training)
    folder = Path(capsys.readouterr().out.split("run: ")[1].strip())
    assert samplings
    for command in samplings:
        name = f"outputs/train/{folder.name.rpartition('-')[0]}-HASH"
        assert name in command
        run(command.replace(name, str(folder.relative_to(workshop))))
        assert Path(capsys.readouterr().out.split("gallery: ")[1].strip()).is_file()


def test_export(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXPORT)
    assert Path(capsys.readouterr().out.split("export: ")[1].strip()).is_file()


def test_ci_runs_the_command_of_two_ranks() -> None:
    """Lightning starts the second rank from the command line, so CI runs this one as it stands."""
    assert TWO_RANKS.removeprefix("python ") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_python_example(workshop: Path) -> None:
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "model.sample(" in text]
    names: dict[str, object] = {}
    exec(code.replace("steps=20", "steps=2"), names)
    assert Path("cat.png").is_file()
    assert Path("my_gallery", "index.html").is_file()
