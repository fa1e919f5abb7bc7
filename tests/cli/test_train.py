"""``train.py``: it leaves a run folder that can be sampled from, and goes on where it stopped."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.data.making import image_folder

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]

SMALL = (
    "experiment=digits",
    "model.hidden_size=48",
    "model.depth=2",
    "model.num_heads=3",
    "data.batch_size=16",
    "every_n_steps.checkpoint=2",
    "every_n_steps.log=1",
    "max_steps=4",
)


@pytest.fixture
def train(in_process: Command) -> Command:
    """``train.py`` with a small model of the digits, for four steps."""

    def run(*arguments: str) -> Any:
        return in_process("train", *SMALL, *arguments)

    return run


def run_folder(outcome: Any) -> Path:
    """The folder that the command named last."""
    assert outcome.code == 0, outcome.err
    last = outcome.out.splitlines()[-1]
    assert last.startswith("run: ")
    return Path(last.removeprefix("run: "))


def steps_of(folder: Path) -> int:
    """The optimiser steps that the newest checkpoint has seen."""
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return int(torch.load(newest, weights_only=True)["global_step"])


def test_a_run_can_be_sampled_from(train: Command, in_process: Command, tmp_path: Path) -> None:
    folder = run_folder(train())
    assert re.fullmatch(r"digits-[0-9a-f]{8}", folder.name)
    assert folder.parent == tmp_path / "outputs" / "train"
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["hidden_size"] == 48
    assert config["class_names"] == [str(digit) for digit in range(10)]
    assert "${" not in (folder / "config.yaml").read_text()
    assert steps_of(folder) == 4

    drawn = in_process(
        "sample", f"ckpt={folder}", "steps=2", "num_images=2", "batch_size=2", "cfg_scale=1.5"
    )
    assert drawn.code == 0, drawn.err
    with Image.open(drawn.folder() / "images" / "000001.png") as image:
        assert np.asarray(image).shape == (8, 8)


def test_the_same_command_again_trains_no_further(train: Command, contents: Contents) -> None:
    folder = run_folder(train())
    before = contents(folder)["model.safetensors"]
    again = train()
    assert run_folder(again) == folder
    assert "finished at step 4: nothing is left to train" in again.out
    assert again.evaluations == 0
    # The averaged weights, not the raw ones that training would go on with.
    assert contents(folder)["model.safetensors"] == before


def test_a_run_shorter_than_its_intervals_goes_on_from_its_end(
    train: Command, contents: Contents
) -> None:
    long = "every_n_steps.checkpoint=1000"
    whole = contents(run_folder(train("out=whole", "max_steps=5", long)))
    folder = run_folder(train("out=parts", "max_steps=3", long))
    assert steps_of(folder) == 3
    first = contents(folder)["model.safetensors"]
    # Killed at step 5 before the weights were exported: those of step 3 do not count as done.
    assert run_folder(train("out=parts", "max_steps=5", long)) == folder
    (folder / "finished.json").write_text('{"step": 3}')
    assert first != contents(folder)["model.safetensors"] == whole["model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"")
    assert run_folder(train("out=parts", "max_steps=5", long)) == folder
    assert contents(folder)["model.safetensors"] == whole["model.safetensors"]


def test_a_schedule_that_ends_at_max_steps_is_not_prolonged(
    train: Command, contents: Contents
) -> None:
    cosine = ("schedule=cosine", "schedule.num_warmup_steps=1", "out=run")
    folder = run_folder(train(*cosine, "max_steps=2"))
    before = contents(folder)
    longer = train(*cosine, "max_steps=4")
    assert longer.code == 1
    assert "max_steps=4: the learning rate of the run in out=run follows from" in longer.err
    assert "repeat max_steps=2, or choose another out" in longer.err
    assert contents(folder) == before
    assert train(*cosine, "max_steps=2").evaluations == 0
    # The same holds for no other schedule.
    assert train("schedule=warmup", "out=other", "max_steps=2").code == 0
    assert train("schedule=warmup", "out=other", "max_steps=3").code == 0


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the CSV log, but for what is measured in time."""
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {"images/s", "memory_gb", "mfu"}
    return [{key: row[key] for key in row.keys() - measured} for row in rows]


def test_a_run_goes_on_where_it_ended_weights_and_log(train: Command, contents: Contents) -> None:
    """As after a kill: its last checkpoint is older than its last log entry."""
    options = ("every_n_steps.validation=2", "every_n_steps.preview=2", "preview.steps=2")
    whole = run_folder(train("out=whole", "max_steps=6", *options))
    first = run_folder(train("out=parts", "max_steps=3", *options))
    assert [row["step"] for row in logged(first)] == ["0", "1", "1", "2"]
    (first / "checkpoints" / "step-00000003.ckpt").unlink()
    assert steps_of(first) == 2
    parts = run_folder(train("out=parts", "max_steps=6", *options))
    here, there = contents(parts), contents(whole)
    for name in here:
        if name.endswith((".safetensors", ".png")):
            assert here[name] == there[name], name
    assert here.keys() == there.keys()
    assert logged(parts) == logged(whole)
    # Every training step once, and what was validated after the second, fourth and sixth.
    steps = [row["step"] for row in logged(whole)]
    assert steps == ["0", "1", "1", "2", "3", "3", "4", "5", "5"]
    assert [bool(row["val/loss"]) for row in logged(whole)] == [False, False, True] * 3
    columns = set(logged(whole)[0])
    assert {"train/loss", "train/grad_norm", "loss_by_level/4_of_4"} < columns


def test_the_same_command_gives_the_same_weights_elsewhere(
    train: Command, contents: Contents
) -> None:
    left = contents(run_folder(train("out=left")))
    right = contents(run_folder(train("out=right", "logger=none")))
    assert [name for name in left.keys() - right.keys()] == ["logs/metrics.csv"]
    assert left["model.safetensors"] == right["model.safetensors"]
    other = contents(run_folder(train("out=other", "seed=1")))
    assert other["model.safetensors"] != left["model.safetensors"]


def forget_warmup(folder: Path) -> None:
    """Make a run look as versions without ``ema.warmup`` left it."""
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert "warmup" not in record["settings"]["ema"]
    record["config"]["ema"].pop("warmup", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


def test_a_run_begun_before_there_was_a_warm_up_goes_on_without(
    train: Command, contents: Contents
) -> None:
    whole = contents(run_folder(train("out=whole", "ema.warmup=false")))
    begun = run_folder(train("ema.warmup=false", "max_steps=2"))
    assert run_folder(train()) != begun
    forget_warmup(begun)
    # The same command as before, which did not state the key; and once more after that.
    for steps in (3, 4):
        assert run_folder(train(f"max_steps={steps}")) == begun
        assert steps_of(begun) == steps
        forget_warmup(begun)
    assert contents(begun)["model.safetensors"] == whole["model.safetensors"]
    assert contents(run_folder(train()))["model.safetensors"] == whole["model.safetensors"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of four small images each, one of which is transparent."""
    root = image_folder(tmp_path / "photos", side=8)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(root / "cats" / "clear.png")
    return root


@pytest.fixture
def train_on(in_process: Command, photos: Path) -> Command:
    """``train.py`` with a small model of the photos, for four steps."""
    small = (*SMALL[1:], "data.batch_size=4", "data.workers=0", "resolution=8", "patch_size=2")

    def run(*arguments: str) -> Any:
        return in_process("train", "experiment=folder", f"data.root={photos}", *small, *arguments)

    return run


def test_a_run_tells_of_its_data_at_the_start(train_on: Command, train: Command) -> None:
    (photos,) = [out for out in train_on("max_steps=1").out.split("run: ") if "data: " in out]
    assert photos.splitlines()[:2] == [
        "data: 9 images in 2 classes",
        "  classes  cats (5), dogs (4)",
    ]
    assert "note: 1 is transparent and laid over white" in photos
    told = "data: 1,797 images in 10 classes: 1,078 to train on, 719 held out"
    assert told in train("max_steps=1").out


def forget_background(folder: Path) -> None:
    """Make a run look as versions without ``data.background`` left it."""
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert "background" not in record["settings"]["data"]
    record["config"]["data"].pop("background", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


def test_a_run_begun_before_there_was_a_background_keeps_its_reader(
    train_on: Command, contents: Contents
) -> None:
    whole = contents(run_folder(train_on("out=whole", "data.background=null")))
    begun = run_folder(train_on("data.background=null", "max_steps=2"))
    # Its name is what the same run is called now, which is another one where that is taken.
    fresh = run_folder(train_on("max_steps=2"))
    assert fresh != begun
    forget_background(begun)
    assert run_folder(train_on()) == begun
    weights = contents(begun)["model.safetensors"]
    assert weights == whole["model.safetensors"]
    assert weights != contents(run_folder(train_on("out=white")))["model.safetensors"]


def renamed(photos: Path) -> None:
    (photos / "cats").rename(photos / "kittens")


def more(photos: Path) -> None:
    Image.new("RGB", (8, 8)).save(photos / "cats" / "more.png")


def larger(photos: Path) -> None:
    Image.new("RGB", (80, 80), (1, 2, 3)).save(photos / "cats" / "clear.png")


def another_class(photos: Path) -> None:
    (photos / "birds").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "birds" / "0.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed, "classes gone: cats (5 images); new classes: kittens (5 images)"),
        (more, "images of cats: 5, now 6; 9 images in all, now 10"),
        (larger, "as many images of each class, but of other names or sizes"),
        (another_class, "new classes: birds (1 image); 9 images in all, now 10"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_unless_told_to(
    change: Callable[[Path], None],
    told: str,
    train_on: Command,
    photos: Path,
    contents: Contents,
) -> None:
    folder = run_folder(train_on("max_steps=2"))
    assert run_folder(train_on("max_steps=3")) == folder
    before = contents(folder)
    change(photos)
    refused = train_on("max_steps=4")
    assert refused.code == 1 and "Traceback" not in refused.err
    assert f"the data has changed since the run began ({told})" in refused.err
    assert {**contents(folder), "config.yaml": ""} == {**before, "config.yaml": ""}
    if change is another_class:  # which the model does not have
        assert "changed_data" not in refused.err
        assert train_on("max_steps=4", "changed_data=true").err == refused.err
        shutil.rmtree(photos / "birds")
        assert run_folder(train_on("max_steps=4")) == folder
        return
    assert "changed_data=true" in refused.err
    on_purpose = train_on("max_steps=4", "changed_data=true")
    assert run_folder(on_purpose) == folder
    assert f"({told}), on purpose" in on_purpose.out
    # From then on the run is one of this data.
    assert run_folder(train_on("max_steps=5")) == folder


def test_a_run_of_before_is_taken_to_have_the_data_it_has(train_on: Command, photos: Path) -> None:
    folder = run_folder(train_on("max_steps=2"))
    (folder / "data.json").unlink()
    more(photos)
    assert run_folder(train_on("max_steps=3")) == folder
    renamed(photos)
    assert train_on("max_steps=4").code == 1
    (folder / "data.json").write_text('{"images": 3}')
    damaged = train_on("max_steps=4")
    assert damaged.code == 1 and "data.json cannot be read" in damaged.err


def test_misspelt_keys_and_experiments(train: Command) -> None:
    outcome = train("max_stpes=3")
    assert outcome.code == 1
    assert "max_stpes=3: no such key" in outcome.err
    assert "Did you mean max_steps" in outcome.err
    outcome = train("model.dept=3")  # known only to the experiment
    assert outcome.code == 1
    assert "model.dept=3: " in outcome.err and "Did you mean depth?" in outcome.err
    outcome = train("experiment=digit")
    assert outcome.code == 1
    assert "expected one of digits, digits_unet" in outcome.err


def test_what_must_be_told_is_asked_for(in_process: Command) -> None:
    outcome = in_process("train")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "name" in outcome.err and "experiment" in outcome.err


def test_a_flow_is_trained_measured_sampled_and_fine_tuned(
    in_process: Command, tmp_path: Path
) -> None:
    """SiT's recipe on the digits: all that is drawn on the way needs a sampler of flows."""
    small = (*SMALL[1:6], "max_steps=2")
    often = ("every_n_steps.preview=2", "preview.steps=2", "every_n_steps.validation=2")
    sizes = ("vae=null", "resolution=8", "patch_size=2", "num_classes=null", "matmul=highest")
    track = ("track=fid", "track.every_n_steps=2", "track.num_images=4", "track.steps=2")
    recipe = ("experiment=sit_imagenet256", "data=digits", *sizes, *small, *often, *track)
    folder = run_folder(in_process("train", *recipe, "out=flow"))
    assert json.loads((folder / "config.json").read_text())["process"]["time_scale"] == 1.0
    assert (folder / "previews" / "step-00000002.png").exists()
    (row,) = (row for row in logged(folder) if row["metrics/fid"])
    assert float(row["metrics/fid"]) > 0
    assert [bool(row["val/loss"]) for row in logged(folder)][-1]

    two = ("steps=2", "num_images=2", "batch_size=2")
    # The sampler of a flow need not be named, and the folder is that of the one that is meant.
    asked = (f"ckpt={folder}", *two, "cfg_scale=1.5")
    drawn = in_process("sample", *asked)
    assert drawn.code == 0, drawn.err
    record = yaml.safe_load((drawn.folder() / "config.yaml").read_text())
    assert record["settings"]["sampler"]["name"] == "euler_flow"
    assert record["config"]["sampler"] == {
        "_target_": "sag_dit.sampler.EulerFlow",
        "shift": None,
    }
    named = in_process("sample", *asked, "sampler=euler_flow")
    assert (named.folder(), named.evaluations) == (drawn.folder(), 0)
    refused = in_process("sample", f"ckpt={folder}", *two, "sampler=ddim")
    assert refused.code == 1
    assert "sampler=ddim" in refused.err and "use sampler=euler_flow" in refused.err
    noisy = in_process("sample", f"ckpt={folder}", *two, "sampler.eta=1")
    assert noisy.code == 1 and "eta=1: expected 0" in noisy.err

    tuning = ("experiment=finetune", f"ckpt={folder}", "data=digits", "data.classes=[8,9]")
    tuned = run_folder(in_process("train", *tuning, "data.batch_size=16", "max_steps=2", *often))
    assert (tuned / "previews" / "step-00000002.png").exists()
    assert in_process("sample", f"ckpt={tuned}", *two, "sampler=heun_flow").code == 0
