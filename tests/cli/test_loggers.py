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
        places = {"guided": "images", "unguided": "unguided", "all but SAG": "without_sag"}
        for column, folder in places.items():
            expected = pixels(tmp_path / "o" / folder / f"{row['index']:06d}.png")
            np.testing.assert_array_equal(pixels(files[row[column]["sha256"]]), expected)
        masks = row["masks"]["masks"]
        assert list(masks) == [f"step {step}" for step in range(4)]
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
    assert table["columns"] == ["index", "class", "seed", "unguided", "guided", "masks"]


@pytest.mark.usefixtures("wandb_offline")
def test_each_job_of_a_sweep_has_a_run_of_its_own(sample: Command, tmp_path: Path) -> None:
    import wandb

    few = ("num_images=1", "steps=1", "logger=wandb")
    outcome = sample("-m", "seed=1,2", *few)
    assert outcome.code == 0, outcome.err
    assert wandb.run is None
    runs = sorted(tmp_path.glob("outputs/sample/*/wandb/offline-run-*"))
    assert len(runs) == len({run.parents[1] for run in runs}) == 2
    seeds = []
    for run in runs:
        (file,) = run.glob("files/media/table/gallery*.table.json")
        table = json.loads(file.read_text())
        seeds += [row[table["columns"].index("seed")] for row in table["data"]]
    assert sorted(seeds) == [1, 2]
    # A run that somebody has begun before, as in a notebook, is his to end.
    with wandb.init(dir=tmp_path / "mine") as mine:
        assert sample("seed=3", *few).code == 0
        assert wandb.run is mine


@pytest.mark.parametrize(
    "arguments",
    [("sample", "num_images=1"), ("train", "experiment=digits", "max_steps=1")],
    ids=["sample", "train"],
)
@pytest.mark.usefixtures("logged_out")
def test_nobody_logged_in_is_told_before_any_work(
    in_process: Command, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = in_process(*arguments, "logger=wandb", f"out={tmp_path / 'o'}")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: logger=wandb: ") and outcome.err.count("\n") == 1
    assert "`wandb login`" in outcome.err and "logger.offline=true" in outcome.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        # Weights & Biases tries for ten seconds.
        pytest.param("WANDB_API_KEY", 40 * "a", "127.0.0.1:9", marks=pytest.mark.slow),
        ("WANDB_API_KEY", "short", "WANDB_API_KEY"),
        ("WANDB_MODE", "ofline", "'offline'"),
    ],
)
@pytest.mark.usefixtures("logged_out")
def test_what_weights_and_biases_refuses_is_told_before_any_work(
    sample: Command,
    name: str,
    value: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(name, value)
    outcome = sample("num_images=1", "logger=wandb", f"out={tmp_path / 'o'}")
    assert outcome.code == 1
    (error,) = [line for line in outcome.err.splitlines() if not line.startswith("wandb: ")]
    assert told in error and "logger.offline=true" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("how", ["logger.offline=true", "+logger.mode=offline"])
@pytest.mark.usefixtures("logged_out")
def test_offline_needs_no_login(
    sample: Command, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")  # put back afterwards, as Lightning changes it
    monkeypatch.delenv("WANDB_MODE")
    outcome = sample("num_images=1", "logger=wandb", how, f"out={tmp_path / 'o'}")
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "o").glob("wandb/offline-run-*/run-*.wandb"))
