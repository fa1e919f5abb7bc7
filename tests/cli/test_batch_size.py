"""``batch_size=auto``, and a batch that does not fit, on a CPU that refuses too many rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sag_dit.cli import batch_size
from sag_dit.cli.app import launch
from sag_dit.cli.batch_size import decided_batch_size
from sag_dit.cli.composing import compose
from sag_dit.denoiser import ClassConditional
from sag_dit.sampling import Settings
from tests.cli.conftest import Outcome

Command = Callable[..., Outcome]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, in_process: Command) -> dict[str, int]:
    """How many rows the device has room for, to be changed."""
    limit = {"rows": 8}
    evaluate = ClassConditional.evaluate

    def within(self: ClassConditional, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        if len(x_t) > limit["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return evaluate(self, x_t, t, cond)

    monkeypatch.setattr(ClassConditional, "evaluate", within)
    return limit


@pytest.fixture
def draw(in_process: Command, tiny: Path, room: dict[str, int]) -> Command:
    """``sample.py`` with CFG in the second half alone, so twice the batch is asked late."""
    how = ("steps=4", "sag_scale=0", "cfg_scale=1.5", "guidance.cfg.interval=[0.5,1]")

    def run(*arguments: str) -> Outcome:
        return in_process("sample", f"ckpt={tiny}", *how, "num_images=6", *arguments)

    return run


def recorded(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_auto_is_found_once_and_kept(
    draw: Command, room: dict[str, int], contents: Contents
) -> None:
    first = draw("batch_size=auto")
    assert first.code == 0, first.err
    assert "batch_size: 4, as many as fit" in first.out
    folder = first.folder()
    told = recorded(folder)
    assert told["settings"]["batch_size"] == told["config"]["batch_size"] == 4
    assert "batch_size=4" in (folder / "index.html").read_text()
    # The images are those of that number.
    stated = draw("batch_size=4", "out=stated")
    same = ("images/000000.png", "images/000005.png")
    ours, theirs = contents(folder), contents(stated.folder())
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    # It goes on with it, whatever fits now.
    room["rows"] = 32
    again = draw("batch_size=auto", "num_images=8")
    assert again.folder() == folder and f"batch_size: 4, as {folder} was begun with" in again.out
    assert recorded(folder)["settings"]["batch_size"] == 4
    (folder / "images/000001.png").unlink()
    room["rows"] = 3
    less = draw("batch_size=auto", "num_images=8")
    assert less.code == 1 and "Traceback" not in less.err
    assert "batch_size=4 does not fit the memory of cpu" in less.err
    assert "batch_size=1 does; images that are drawn so are another set" in less.err
    assert contents(folder)["images/000005.png"] == ours["images/000005.png"]


def test_auto_takes_the_number_of_the_folder_it_is_given(draw: Command) -> None:
    assert draw("batch_size=2", "out=mine", "num_images=2").code == 0
    outcome = draw("batch_size=auto", "out=mine")
    assert outcome.code == 0, outcome.err
    assert "batch_size: 2, as mine was begun with" in outcome.out
    assert recorded(Path("mine"))["settings"]["batch_size"] == 2


def test_a_batch_that_is_too_large_is_told_before_the_first_image(draw: Command) -> None:
    outcome = draw("batch_size=6", "out=o")
    assert outcome.code == 1
    assert "batch_size=6 does not fit the memory of cpu (12 rows at once): max_rows=6 does" in (
        outcome.err
    )
    assert "Traceback" not in outcome.err and not any(Path("o/images").iterdir())
    assert draw("batch_size=6", "max_rows=6").code == 0


def test_auto_stays_within_max_rows(draw: Command) -> None:
    outcome = draw("batch_size=auto", "max_rows=2", "num_images=4")
    assert outcome.code == 0, outcome.err
    assert "batch_size: 2, as many as fit" in outcome.out


@pytest.mark.parametrize(
    ("command", "told"),
    [("train", "data.batch_size (in another out), or with checkpoint"), ("encode", "slice_size")],
)
def test_memory_that_is_full_elsewhere_is_one_sentence(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [f"{command}.py"])
    arguments = ["experiment=digits"] if command == "train" else ["data.root=photos"]
    with pytest.raises(SystemExit):
        launch(command, run, arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Tried to allocate 2.00 GiB." in error
    assert f"repeat the command with a smaller {told}" in error


def test_not_even_one_image(draw: Command, room: dict[str, int]) -> None:
    room["rows"] = 0
    outcome = draw("batch_size=auto")
    assert outcome.code == 1 and "nor does one image" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("value", ["0", "many", "1.5", "-1", "[4]"])
def test_a_batch_size_is_a_number_or_auto(draw: Command, value: str) -> None:
    outcome = draw(f"batch_size={value}")
    assert outcome.code == 1
    assert f"batch_size={value}: expected a whole number, 1 to 65,536, auto or null" in outcome.err


def test_evaluate_compares_at_a_stated_number() -> None:
    with pytest.raises(ValueError, match="batch_size=auto: expected"):
        compose("evaluate", ["ckpt=digits", "batch_size=auto"])


def test_other_ranks_read_what_the_first_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, nothing = compose("sample", ["batch_size=auto"]), Settings()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(batch_size, "EVERY", 0.01)
    model: Any = None  # This rank tries nothing.

    def write() -> None:
        (tmp_path / "config.yaml").write_text("settings: {batch_size: 8}")

    timer = Timer(0.2, write)
    timer.start()
    assert decided_batch_size(config, tmp_path, model, nothing, 4) == 8
    timer.join()
    monkeypatch.setattr(batch_size, "PATIENCE", 0.05)
    with pytest.raises(ValueError, match="expected a disk that all ranks see"):
        decided_batch_size(config, tmp_path / "none", model, nothing, 4)


@pytest.mark.slow
def test_two_ranks_draw_at_one_number(in_other_process: Command, contents: Contents) -> None:
    arguments = ("ckpt=digits", "steps=2", "num_images=5", "gallery.num=0", "batch_size=auto")
    both = in_other_process(*arguments, "trainer.accelerator=cpu", "trainer.devices=2", "out=two")
    assert both.code == 0 and not both.outlived, both.err
    assert both.out.count("batch_size: 8, as many as fit") == 1
