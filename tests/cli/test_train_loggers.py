"""A run that goes on keeps its one log, at Weights & Biases (offline) and with TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.offline import history, records, staged_tables

Command = Callable[..., Any]


@pytest.fixture
def train(in_process: Command, tmp_path: Path) -> Command:
    """``train.py`` with a small model; checkpoints of every second step, a log of every one."""

    def run(*arguments: str) -> None:
        small = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3")
        every = ("checkpoint=2", "log=1", "preview=2", "validation=1000")
        outcome = in_process(
            "train",
            "experiment=digits",
            "data.batch_size=8",
            f"out={tmp_path / 'run'}",
            "preview.steps=2",
            "preview.classes=[3,7]",
            *small,
            *(f"every_n_steps.{each}" for each in every),
            *arguments,
        )
        assert outcome.code == 0, outcome.err

    return run


def test_tensorboard_shows_every_step_once(train: Command) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("logger=tensorboard", "max_steps=3")
    train("logger=tensorboard", "max_steps=5")
    log = reading.EventAccumulator("run/logs").Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1, 2, 3, 4]
    assert "train/grad_norm" in log.Tags()["scalars"]
    assert len(list(Path("run/logs").glob("events.*"))) > 1, "two starts wrote into one folder"


def sheet(table: dict[str, Any], files: dict[str, Path]) -> np.ndarray:
    """Lay a table out as the picture on disk: a column per class, unguided above guided."""
    assert table["columns"] == ["class", "unguided", "guided"]
    assert [row[0] for row in table["data"]] == ["3", "7"]
    grid = np.zeros((1 + 2 * 9, 1 + 2 * 9), np.uint8)
    for column, row in enumerate(table["data"]):
        for line, cell in enumerate(row[1:]):
            top, left = 1 + 9 * line, 1 + 9 * column
            with Image.open(files[cell["sha256"]]) as image:
                grid[top : top + 8, left : left + 8] = np.asarray(image.convert("L"))
    return grid


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_goes_on_with_one_run_and_holds_tables_of_previews(
    train: Command, tmp_path: Path
) -> None:
    import wandb

    train("logger=wandb", "max_steps=3")
    wandb.finish()
    train("logger=wandb", "max_steps=5")
    wandb.finish()
    starts = sorted(Path("run/wandb").glob("offline-run-*"))
    run_id = Path("run/wandb_id.txt").read_text()
    runs = [record.run for each in starts for record in records(each) if record.HasField("run")]
    assert [(run.run_id, run.display_name) for run in runs] == [(run_id, "run")] * 2
    updates = [u for r in records(starts[1]) if r.HasField("config") for u in r.config.update]
    (settings,) = [json.loads(u.value_json) for u in updates if u.key == "optimizer"]
    assert settings["lr"] == 1.5e-3

    rows = [row for each in starts for row in history(each)]
    losses = {row["trainer/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == [0, 1, 2, 3, 4]
    tables = [row for row in rows if "previews/path" in row]
    assert [row["trainer/global_step"] for row in tables] == [2, 4]

    shown = [sheet(table, files) for table, files in staged_tables(tmp_path / "staged")]
    for step in (2, 4):
        with Image.open(f"run/previews/step-{step:08d}.png") as picture:
            written = np.asarray(picture.convert("L"))[::8, ::8]  # pixels are enlarged eight times
        assert any(np.array_equal(written, each) for each in shown)
