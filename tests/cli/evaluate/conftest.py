"""``evaluate.py`` in this process, on the bundled digits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sag_dit.cli import evaluate as command
from sag_dit.cli.composing import compose
from sag_dit.cli.keys import Evaluate as Keys
from sag_dit.denoiser import ClassConditional


@dataclass(frozen=True)
class Outcome:
    """What the command gave back."""

    code: int
    out: str
    err: str
    evaluations: int
    """How many rows the network was asked for."""

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        (line,) = [line for line in self.out.splitlines() if line.startswith("results: ")]
        return Path(line.removeprefix("results: ")).parent

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of results.json."""
        assert self.code == 0, self.err
        found: list[dict[str, Any]] = json.loads((self.folder / "results.json").read_text())[
            "results"
        ]
        return found


Evaluate = Callable[..., Outcome]


@pytest.fixture(scope="session")
def defaults() -> Keys:
    """The configuration of ``python evaluate.py``."""
    config: Keys = compose("evaluate")
    return config


@pytest.fixture(scope="session")
def kept_references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where references are kept, instead of the user's own folder."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def evaluate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept_references: Path,
) -> Evaluate:
    """Run the command in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("SAG_DIT_CACHE", str(kept_references))
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    rows = 0
    ask = ClassConditional.evaluate

    def counting(self: ClassConditional, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        nonlocal rows
        rows += x_t.shape[0]
        return ask(self, x_t, t, cond)

    monkeypatch.setattr(ClassConditional, "evaluate", counting)

    def run(*arguments: str) -> Outcome:
        nonlocal rows
        rows, code = 0, 0
        capsys.readouterr()
        try:
            command.start(arguments)
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return Outcome(code, *capsys.readouterr(), rows)

    return run


@pytest.fixture
def draw(evaluate: Evaluate) -> Evaluate:
    """Evaluate the digits with few images and steps."""

    def run(*arguments: str) -> Outcome:
        small = ("ckpt=digits", "steps=2", "num_images=30", "batch_size=15", "gallery.num=2")
        flags = [each for each in arguments if each.startswith("-")]
        rest = [each for each in arguments if not each.startswith("-")]
        return evaluate(*flags, *small, "trainer.accelerator=cpu", *rest)

    return run
