"""Misuse of ``train.py`` ends before the first step with one screen that names value and remedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sag_dit.files import atomic, using
from sag_dit.training import resume
from tests.data.making import image_folder, save_vae, truncate

Command = Callable[..., Any]

TINY = ("model.hidden_size=48", "model.depth=1", "model.num_heads=3")


def assert_refused(outcome: Any, *parts: str) -> None:
    assert outcome.code == 1, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    error = outcome.err[outcome.err.index("error: ") :]
    for part in parts:
        assert part in error


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photos of cats and dogs, 20 to 28 pixels on each side."""
    return image_folder(tmp_path / "photos")


@pytest.fixture
def train(in_process: Command, photos: Path) -> Command:
    """``train.py`` for two steps on these photos."""

    def run(*arguments: str) -> Any:
        defaults = ("experiment=folder", f"data.root={photos}", "data.workers=0", "resolution=16")
        quick = ("data.batch_size=4", "max_steps=2", "every_n_steps.log=1", "logger=none")
        return in_process("train", *defaults, *quick, *TINY, *arguments)

    return run


SETTINGS = {
    "data.root={here}/nothing": ("data.root=", "nothing", "does not exist"),
    "data.root={here}/empty": ("no image found", "expected files ending in"),
    "data.root={here}/gap": ("no image in 1 of 3 class folders", "mice", "add images"),
    "resolution=18": ("resolution=18", "a multiple of 4", "patch_size=4"),
    "vae={here}/vae resolution=12": ("resolution=12", "a multiple of 8", "factor 2"),
    "data.size=8": ("data.size=8", "expected 16"),
    "data.batch_size=9": ("data.batch_size=9", "from 1 to 8"),
    "data.batch_size=5 trainer.devices=2 trainer.accelerator=cpu": (
        "data.batch_size=5 on 2 ranks",
        "a multiple of 2, such as 6",
    ),
    "num_classes=3": ("the data has 2 classes and the model 3",),
    "ema.decay=1": ("ema.decay=1", "expected a number, 0 to less than 1"),
    "every_n_steps.checkpoint=0": (
        "every_n_steps.checkpoint=0",
        "expected a whole number, 1 or more",
    ),
    "objective=flow": ("Flow",),
    "trainer.precision=31": ("31", "32-true"),
    "trainer.accumulate_grad_batches=0": ("accumulate_grad_batches", "0"),
    "model.num_heads=5": ("hidden_size=48", "num_heads=5"),
}


@pytest.mark.parametrize("arguments", SETTINGS)
def test_settings_are_refused_before_anything_is_written(
    train: Command, tmp_path: Path, arguments: str
) -> None:
    (tmp_path / "empty").mkdir()
    (image_folder(tmp_path / "gap") / "mice").mkdir()
    if "vae" in arguments:
        save_vae(tmp_path / "vae")
    outcome = train("out=run", *arguments.format(here=tmp_path).split(" "))
    assert_refused(outcome, *SETTINGS[arguments])
    assert outcome.evaluations == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("preview.classes=[cow]", ("cow", "cats", "dogs")),
        ("+preview.guidance.sag.layer=blocks.7", ("blocks.7", "blocks.0.attn")),
        ("data.strict=true", ("05.png", "remove it, or set strict=false")),
    ],
)
def test_what_would_fail_late_is_refused_before_the_first_step(
    train: Command, photos: Path, argument: str, parts: tuple[str, ...]
) -> None:
    (photos / "dogs" / "05.png").write_bytes(b"no image")
    outcome = train(argument)
    assert_refused(outcome, *parts)
    assert outcome.evaluations == 0


def test_too_small_images_are_enlarged_unless_strict(train: Command) -> None:
    refused = train("resolution=24", "data.strict=true")
    assert_refused(refused, "20 x 22 pixels", "24 or more", "strict=false")
    enlarged = train("resolution=24")
    assert enlarged.code == 0
    assert "8 of 8 images are smaller than 24 pixels and are enlarged" in enlarged.out


def test_a_corrupt_image_is_named_left_out_and_counted(
    train: Command, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(photos / "dogs" / "05.png")  # its header is intact
    outcome = train("data.batch_size=8")
    assert outcome.code == 0, outcome.err
    assert "dogs/05.png cannot be decoded" in caplog.text
    assert "1 of 8 images were left out" in caplog.text


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*.ckpt"))[-1]


def test_what_lies_in_the_folder_of_another_run(train: Command, tmp_path: Path) -> None:
    assert train("out=run", "every_n_steps.checkpoint=2").code == 0
    before = newest(tmp_path / "run").read_bytes()
    outcome = train("out=run", "max_steps=4", "optimizer.lr=3e-4", "data.workers=1")
    assert_refused(outcome, "out=run holds a run of other settings", "Choose another out")
    assert "optimizer.lr: there 0.0001, now 0.0003" in outcome.err
    assert "workers" not in outcome.err.partition("error: ")[2], (
        "what does not change the weights may change"
    )

    (tmp_path / "run" / "config.yaml").unlink()
    outcome = train("out=run", "max_steps=4", "model.depth=2")
    file = "run/checkpoints/step-00000002.ckpt"
    assert_refused(outcome, f"{file} is of another model", "averaged.module.network.blocks.1")
    assert outcome.evaluations == 0
    assert newest(tmp_path / "run").read_bytes() == before


def test_a_full_disk_ends_training_and_leaves_the_last_checkpoint(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(file: Path) -> Iterator[Path]:
        with atomic(file) as temporary:
            temporary.symlink_to("/dev/full")
            yield temporary

    command = ("out=run", "every_n_steps.checkpoint=2")
    assert train(*command).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(resume, "atomic", full)
        outcome = train(*command, "max_steps=6")
    assert_refused(
        outcome,
        "step-00000004.ckpt could not be written (No space left on device)",
        "make room, then repeat the command",
    )
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-00000002.ckpt"
    ]
    assert train(*command, "max_steps=4").code == 0
    assert torch.load(newest(tmp_path / "run"), weights_only=True)["global_step"] == 4


def test_a_run_in_use_is_refused_and_a_finished_one_that_is_read_only_succeeds(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    with using(tmp_path / "run"):
        outcome = train("out=run")
    assert_refused(outcome, "another run is using this folder: run")
    assert outcome.evaluations == 0
    assert train("out=run").code == 0
    before = sorted((each, each.stat().st_mtime_ns) for each in (tmp_path / "run").rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    again = train("out=run")
    assert (again.code, again.evaluations) == (0, 0), again.err
    # Nothing but the lock came and went.
    after = sorted((each, each.stat().st_mtime_ns) for each in (tmp_path / "run").rglob("*"))
    assert after == before


def test_too_little_room_is_refused_before_the_first_step(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda folder: type("", (), {"free": 9}))
    outcome = train()
    assert_refused(outcome, "0.0 MB are free", "make room")


def test_a_run_that_diverged_at_its_end_exports_nothing(train: Command, tmp_path: Path) -> None:
    # Without an epsilon Adam divides by nothing where a gradient is 0.
    arguments = ("out=run", "every_n_steps.checkpoint=1", "+optimizer.eps=0")
    done = train(*arguments, "max_steps=1")
    assert_refused(done, "run: weights that are NaN or infinite", "train anew, with a smaller")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert newest(tmp_path / "run").is_file()


def test_the_last_good_checkpoint_is_named(
    train: Command, in_process: Command, photos: Path, tmp_path: Path
) -> None:
    assert train("out=run", "every_n_steps.checkpoint=1", "max_steps=1").code == 0
    checkpoint = newest(tmp_path / "run")
    saved = torch.load(checkpoint, weights_only=True)
    for name, tensor in saved["state_dict"].items():
        if name.endswith("qkv.weight"):
            tensor[0] = float("nan")
    torch.save(saved, checkpoint.with_name("step-00000002.ckpt"))
    told = resume._last_good(tmp_path / "run")
    assert f"the newest checkpoint without is {checkpoint}: draw from it" in told
    diverged = checkpoint.with_name("step-00000002.ckpt")
    data = (f"data.root={photos}", "logger=none", "max_steps=1")
    tuned = in_process("train", "experiment=finetune", f"ckpt={diverged}", *data)
    assert_refused(tuned, f"ckpt={diverged}: weights that are NaN or infinite")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("experiment=digits", "+trainer.gradient_clip_algorithm=value"),
            "trainer.gradient_clip_algorithm=value: nothing is clipped",
        ),
        (
            ("experiment=finetune", "ckpt=digits", "data=digits", "lora.alpha=2"),
            "lora.alpha=2: scales adapters, and lora.rank=null trains none",
        ),
    ],
)
def test_what_acts_on_nothing_is_refused(
    arguments: tuple[str, ...], told: str, in_process: Command
) -> None:
    done = in_process("train", *arguments, "max_steps=1", "out=run")
    assert done.code == 1 and told in done.err, done.err
