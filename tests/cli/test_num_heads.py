"""``num_heads`` for a checkpoint that does not tell how many heads it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import NUM_HEADS, Command


@pytest.fixture
def untold(save_official: Callable[..., Path], tmp_path: Path) -> Path:
    """A file whose number of heads stands nowhere."""
    file = save_official(tmp_path / "untold.pt")
    file.with_suffix(".json").unlink()
    return file


def test_heads_are_told_at_the_command_line(in_process: Command, tiny: Path, untold: Path) -> None:
    asked = ("num_images=1", "steps=2", "batch_size=1", "gallery.num=0")
    known = in_process("sample", f"ckpt={tiny}", *asked).folder()
    told = in_process("sample", f"ckpt={untold}", f"num_heads={NUM_HEADS}", *asked).folder()
    image = Path("images/000000.png")
    assert (told / image).read_bytes() == (known / image).read_bytes()
    records = [yaml.safe_load((each / "config.yaml").read_text()) for each in (known, told)]
    assert [each["settings"]["network"]["model"]["num_heads"] for each in records] == [3, 3]
    # Where it is not stated, a run records what it always did.
    assert [each["config"].get("num_heads", "not there") for each in records] == ["not there", 3]


def test_heads_of_a_fresh_model_are_the_model_s(in_process: Command) -> None:
    outcome = in_process("train", "experiment=digits", "num_heads=4", "out=o")
    assert outcome.code == 1 and "a fresh model has model.num_heads=4" in outcome.err
