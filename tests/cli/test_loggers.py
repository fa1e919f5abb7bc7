"""``logger=wandb`` for real, offline: the gallery as a table of pictures with scales and masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.offline import staged_tables

Command = Callable[..., Any]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_holds_the_gallery(sample: Command, tmp_path: Path) -> None:
    arguments = ("num_images=3", "gallery.num=2", "classes=[4,8]", "seed=6")
    # Absolute, since the service may have been started by another test, in another folder.
    arguments += (f"out={tmp_path / 'o'}",)
    outcome = sample(*arguments, "sag_scale=0.75", "cfg_scale=1.5", "logger=wandb")
    assert outcome.code == 0, outcome.err
    import wandb

    wandb.finish()  # which writes what is still on its way
    (run,) = (tmp_path / "o").glob("wandb/offline-run-*")
    assert list(run.glob("run-*.wandb"))
    (shown,) = run.glob("files/media/table/gallery*.table.json")
    assert len(json.loads(shown.read_text())["data"]) == 2

    ((table, files),) = staged_tables(tmp_path / "staged")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["index"], row["class"], row["seed"]) for row in rows] == [(0, "4", 6), (1, "8", 6)]
    for row in rows:
        assert (row["sag_scale"], row["cfg_scale"]) == (0.75, 1.5)
        for column, folder in (("guided", "images"), ("unguided", "unguided")):
            expected = pixels(tmp_path / "o" / folder / f"{row['index']:06d}.png")
            np.testing.assert_array_equal(pixels(files[row[column]["sha256"]]), expected)
        masks = row["masks"]["masks"]
        assert list(masks) == [f"step {step} of 4" for step in (1, 2, 3, 4)]
        with np.load(tmp_path / "o" / "maps" / f"{row['index']:06d}.npz") as maps:
            for mask, expected in zip(masks.values(), maps["mask"], strict=True):
                enlarged = expected.repeat(2, axis=0).repeat(2, axis=1)
                values = pixels(files[mask["sha256"]])[..., 0]
                np.testing.assert_array_equal(values, enlarged)


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_without_guidance_logs_no_masks(sample: Command, tmp_path: Path) -> None:
    outcome = sample("num_images=1", f"out={tmp_path / 'o'}", "sag_scale=0", "logger=wandb")
    assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "o").glob("wandb/offline-run-*/files/media/table/gallery*.table.json")
    table = json.loads(file.read_text())
    assert len(table["data"]) == 1
    assert "sag_scale" not in table["columns"]
