"""Small models in the official flat format, and the commands, in this process and in others."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.cli import encode as encode_command
from sag_dit.cli import export as export_command
from sag_dit.cli import sample as sample_command
from sag_dit.cli import train as train_command
from sag_dit.cli.app import launch
from sag_dit.cli.first_rank import tell_once
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from tests.small import filled

ROOT = Path(__file__).resolve().parents[2]
NUM_HEADS = 3

TINY = (
    "experiment=digits",
    "model.hidden_size=24",
    "model.depth=1",
    "model.num_heads=2",
    "data.batch_size=8",
    "every_n_steps.log=1",
)
"""A run of seconds on the digits that logs every step."""
TIMES = {"images/s", "memory_gb"}
"""Columns of the log that a clock or a machine decides."""


def random_dit(seed: int = 0, **options: object) -> DiT:
    """A pixel DiT of 8x8 images in 4x4 tokens, none of whose weights is zero."""
    defaults: dict[str, object] = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 48,
        "depth": 3,
        "num_heads": NUM_HEADS,
        "num_classes": 10,
    }
    return filled(DiT(**{**defaults, **options}), seed)  # type: ignore[arg-type]


SaveOfficial = Callable[..., Path]


def rows(out: str) -> list[dict[str, str]]:
    """What a run has logged, without what its clock says and columns that are empty."""
    with Path(out, "logs", "metrics.csv").open(newline="") as stream:
        found = [*csv.DictReader(stream)]
    return [{k: v for k, v in row.items() if v and k not in TIMES} for row in found]


@pytest.fixture(scope="session")
def save_official() -> SaveOfficial:
    """Write a DiT as the official .pt is: a flat state dict; a .json beside it names the heads.

    ``change`` alters the state dict; further options are those of DiT.
    """

    def save(
        path: Path,
        *,
        seed: int = 0,
        change: Callable[[dict[str, Tensor]], None] | None = None,
        stated: Mapping[str, object] | None = None,
        **options: object,
    ) -> Path:
        state = dict(random_dit(seed, **options).state_dict())
        if change is not None:
            change(state)
        torch.save(state, path)
        model = {"num_heads": NUM_HEADS, **(stated or {}).get("model", {})}  # type: ignore[dict-item]
        path.with_suffix(".json").write_text(json.dumps({**(stated or {}), "model": model}))
        return path

    return save


@pytest.fixture(scope="session")
def tiny(save_official: SaveOfficial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small DiT of ten classes."""
    return save_official(tmp_path_factory.mktemp("weights") / "tiny.pt")


@dataclass(frozen=True)
class Outcome:
    """What a command gave back."""

    code: int
    out: str
    err: str
    evaluations: int = 0
    """How many rows the network was asked for in this process."""
    outlived: bool = False
    """Whether a process of the command went on without it, or it took minutes."""

    def folder(self) -> Path:
        """The folder of images that the command named."""
        (line,) = [line for line in self.out.splitlines() if line.startswith("images: ")]
        return Path(line.removeprefix("images: ").rpartition(" (")[0]).parent


Command = Callable[..., Outcome]


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a command here, in an empty working directory, as its script does."""
    monkeypatch.chdir(tmp_path)
    # The commands set it themselves; here it must not stay set for other tests.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    rows = 0
    evaluate = ClassConditional.evaluate

    @wraps(evaluate)
    def counting(self: ClassConditional, x_t: Tensor, *args: Any, **known: Any) -> Tensor:
        nonlocal rows
        # A network without memory is only counted.
        rows += 0 if x_t.is_meta else x_t.shape[0]
        return evaluate(self, x_t, *args, **known)

    monkeypatch.setattr(ClassConditional, "evaluate", counting)

    def run(name: str, *arguments: str) -> Outcome:
        nonlocal rows
        rows, code = 0, 0
        capsys.readouterr()
        tell_once.cache_clear()  # As in a process of its own.
        commands = {
            "sample": sample_command.run_sample,
            "train": train_command.run_train,
            "encode": encode_command.run_encode,
            "export": export_command.run_export,
        }
        try:
            launch(name, commands[name], arguments)
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return Outcome(code, *capsys.readouterr(), rows)

    return run


@pytest.fixture
def train(in_process: Command) -> Command:
    """Train, and return the folder of the run."""

    def run(*arguments: str) -> Path:
        done = in_process("train", *arguments)
        assert done.code == 0, done.err
        return Path(done.out.splitlines()[-1].removeprefix("run: "))

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights that a run has exported."""
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    """Whether two runs have exported the same weights, bit for bit."""
    here, there = weights(one), weights(other)
    return here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)


@pytest.fixture
def sample(in_process: Command, tiny: Path) -> Command:
    """``sample.py`` with the tiny model, 4 steps and compute batches of 2."""

    def run(*arguments: str) -> Outcome:
        return in_process("sample", f"ckpt={tiny}", "steps=4", "batch_size=2", *arguments)

    return run


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start ``python sample.py`` in a process group of its own, in an empty directory."""

    def run(
        *arguments: str, script: str = "sample.py", **environment: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


@pytest.fixture
def in_other_process(start: Start) -> Command:
    """Run ``python sample.py`` to its end; none of its ranks may outlive it."""

    def run(*arguments: str, **environment: str) -> Outcome:
        process = start(*arguments, **environment)
        try:
            process.wait(timeout=300)
            # The pipes end when the last process that can write to them has ended.
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return Outcome(process.returncode, out, err, outlived=True)
        return Outcome(process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """List the files below a folder with the sha256 of what they hold."""

    def read(folder: Path) -> dict[str, str]:
        return {
            file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    return read


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Weights & Biases without a network, an account or a word on the terminal."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    # Pictures of a table wait here for their upload.
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    yield
    wandb.finish()


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Weights & Biases on a machine where nobody has logged in and no server answers."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    # Which forgets the settings that another test has read.
    wandb.finish()
    wandb.teardown()
    yield
    wandb.finish()
    wandb.teardown()
