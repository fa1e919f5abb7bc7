"""A disk that fails while a command writes: a sentence, and the same command goes on to the end."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.same_numbers import AUTOENCODER, TINY
from benchmarks.torture import compared
from tests.data.making import image_folder

Command = Callable[..., Any]
Calls = Callable[..., Any]

COMMANDS = {
    "sample": "ckpt=digits steps=2 num_images=6 batch_size=2 gallery.num=1",
    "train": f"experiment=digits {TINY} max_steps=4 data.batch_size=8 every_n_steps.checkpoint=2 "
    "every_n_steps.log=1 trainer.enable_progress_bar=false",
    "encode": f"data.root=pictures data.size=32 vae={AUTOENCODER} rows=1 workers=0",
}
INTACT = "(Input/output error). What was written before is intact"


def no_file_opens(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(io, "open", failing(io.open, lambda file, mode="r", *_: "w" in mode))


def no_file_gets_its_name(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(os, "replace", failing(os.replace, lambda *_: True))


def the_folder_vanishes(patch: pytest.MonkeyPatch, out: Path) -> None:
    def vanish(*_: Any) -> bool:
        shutil.rmtree(out)
        return False

    patch.setattr(os, "replace", failing(os.replace, vanish))


def failing(call: Calls, fails: Calls, at: int = 5) -> Calls:
    """Ask from a call for a temporary file on, the first few left out, whether it fails."""
    calls = 0

    def called(file: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if str(file).endswith(".tmp"):
            calls += 1
            if calls >= at and fails(file, *arguments):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return call(file, *arguments, **options)

    return called


@pytest.mark.parametrize("script", list(COMMANDS))
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (no_file_opens, INTACT),
        (no_file_gets_its_name, INTACT),
        (the_folder_vanishes, "is gone. Put it back and repeat the command"),
    ],
)
def test_a_failing_disk_is_told_and_the_command_goes_on(
    in_process: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    fault: Callable[[pytest.MonkeyPatch, Path], None],
    told: str,
) -> None:
    image_folder(tmp_path / "pictures", each=3)
    command = (*COMMANDS[script].split(), "trainer.accelerator=cpu", "trainer.devices=1")
    assert in_process(script, *command, "out=whole").code == 0
    with monkeypatch.context() as patch:
        fault(patch, tmp_path / "out")
        failed = in_process(script, *command, "out=out")
    assert failed.code == 1
    assert failed.err.count("could not be written") == 1, failed.err
    assert told in failed.err and "Traceback" not in failed.err

    again = in_process(script, *command, "out=out")
    assert again.code == 0, again.err
    assert {kind for kind, _ in compared(tmp_path / "whole", tmp_path / "out")} == {"files"}
