"""``encode.py``: what it refuses, and in which words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sag_dit.files import using
from tests.cli.encode.conftest import Contents, Encode
from tests.data.making import picture, save_vae, truncate


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_names_the_image(
    command: Encode, photos: Path, tmp_path: Path, workers: int
) -> None:
    root = Path(shutil.copytree(photos, tmp_path / "copy"))
    truncate(root / "cats" / "02.png")
    result = command("data.strict=true", f"workers={workers}", root=root)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "cats/02.png cannot be decoded" in line and "Traceback" not in result.err


def test_a_folder_without_any_readable_image(command: Encode, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    result = command(root=tmp_path / "bad")
    assert result.code == 1 and "none of the images can be decoded" in result.err


def test_other_settings_are_refused_by_name(
    command: Encode, contents: Contents, photos: Path, tmp_path: Path
) -> None:
    folder = command().folder
    before = contents(folder)
    result = command("rows=5", "data.upright=false")
    assert result.code == 1 and result.encoded == 0
    assert "rows: there 4, now 5" in result.err and "upright: there True, now False" in result.err
    root = Path(shutil.copytree(photos, tmp_path / "copy"))
    picture(20, 20).save(root / "cats" / "more.png")
    assert "images: there 10, now 11" in command(root=root).err
    assert contents(folder) == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert "holds other files" in command(out="taken").err
    assert "cannot be used as a folder" in command(out="taken/notes.txt").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vae=null",), "vae=null: expected an autoencoder"),
        (("vae=nowhere",), "vae=nowhere: the autoencoder"),
        (("data.root=nowhere",), "data.root=nowhere: does not exist"),
        (("data.size=17",), "size=17: expected a multiple of 2"),
        (("dtype=bfloat16",), "dtype=bfloat16: expected one of float16, float32"),
        (("rows=0",), "rows=0: expected a whole number, 1 to 1,048,576"),
        (("slice_size=0",), "slice_size=0: expected a whole number, 1 to 65,536"),
        (("trainer.precision=16",), "trainer.precision"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    command: Encode, arguments: tuple[str, ...], message: str
) -> None:
    result = command(*arguments)
    assert result.code == 1 and message in result.err and "Traceback" not in result.err
    assert not result.folder.exists()


def test_too_little_room_is_told_at_once(command: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    result = command()
    assert result.code == 1 and result.encoded == 0
    assert "MB are needed and 0.0 MB are free; make room" in result.err


def test_latents_that_half_precision_cannot_hold_are_told(command: Encode, tmp_path: Path) -> None:
    loud = save_vae(tmp_path / "loud", scaling_factor=1e6)
    result = command(f"vae={loud}")
    assert result.code == 1 and "expected an undamaged autoencoder, and dtype=float32" in result.err
    assert command(f"vae={loud}", "dtype=float32", out="full").code == 0


def test_a_folder_in_use_and_a_finished_one_that_is_read_only(
    command: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    with using(tmp_path / "out"):
        refused = command()
    assert (refused.code, refused.encoded) == (1, 0)
    assert "another run is using this folder: out" in refused.err
    first = command()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    again = command()
    assert (again.code, again.encoded, again.out) == (0, 0, first.out)
    assert command(out="other").code == 1
