"""Runs on aspect buckets from the command line: whole, stopped, killed, on two ranks, drawn."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import equal, weights
from tests.closeness import assert_near
from tests.data.test_buckets import photos
from tests.data.test_sources import contents, write_tar

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
BUCKETS = "data.buckets=[[8,8],[6,12],[12,6]]"
SMALL = (
    *("experiment=folder", "model.hidden_size=48", "model.depth=2", "model.num_heads=3"),
    *("resolution=8", "patch_size=2", "data.batch_size=4", "data.workers=0"),
    *("every_n_steps.checkpoint=2", "every_n_steps.log=1", "trainer.accelerator=cpu"),
)


def shards(tmp_path: Path) -> str:
    """The photos in two tar shards, as the root that names them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        samples = {}
        for place, (name, content) in enumerate(contents(photos(tmp_path / "photos")).items()):
            if place % 2 == number:
                samples[name.replace("/", "-")] = content
                samples[f"{name.replace('/', '-').split('.')[0]}.cls"] = name[:3].encode()
        write_tar(folder / f"train-{number:03d}.tar", samples)
    return f"data.root={folder}"


def test_runs_from_shards_are_stopped_changed_in_nothing_and_drawn(
    train: Command, in_process: Command, tmp_path: Path
) -> None:
    own = (*SMALL, shards(tmp_path), BUCKETS, "data.held_out=0.2")
    whole = in_process("train", *own, "out=whole", "max_steps=6", "every_n_steps.validation=3")
    assert whole.code == 0, whole.err
    assert "\n  buckets  8 (" in whole.out
    run = Path(whole.out.splitlines()[-1].removeprefix("run: "))
    train(*own, "out=parts", "max_steps=3", "every_n_steps.preview=1")
    assert equal(run, train(*own, "out=parts", "max_steps=6", "data.workers=1"))
    # Buckets decide the weights, and a run keeps to its own.
    assert not equal(run, train(*own, "out=square", "data.buckets=null", "max_steps=6"))
    refused = in_process("train", *own, "out=parts", "data.buckets=[[8,8],[6,12]]", "max_steps=7")
    assert refused.code == 1 and "data.buckets" in refused.err
    folders = set()
    for size, asked in (((8, 8), "null"), ((12, 6), "[6,12]"), ((6, 12), "[12,6]")):
        own_size = (f"text.size={asked}", "sag_scale=0.5", "guidance.sag.kernel_size=3")
        drawn = in_process("sample", f"ckpt={run}", "num_images=1", "steps=2", *own_size)
        assert drawn.code == 0, drawn.err
        folders.add(drawn.folder())
        with Image.open(drawn.folder() / "images" / "000000.png") as image:
            assert image.size == size
    assert len(folders) == 3
    wrong = in_process("sample", f"ckpt={run}", "num_images=1", "text.size=[7,12]")
    assert wrong.code == 1 and "text.size=[7,12]: expected multiples of 2" in wrong.err


def test_the_rule_fine_tuning_and_a_unet_take_buckets(
    train: Command, in_process: Command, tmp_path: Path
) -> None:
    root = f"data.root={photos(tmp_path / 'photos')}"
    first = train(*SMALL, root, "data.buckets=4", "out=first", "max_steps=2")
    tuned = train(
        *("experiment=finetune", f"ckpt={first}", root, BUCKETS, "data.batch_size=4"),
        *("data.workers=0", "max_steps=2", "out=tuned"),
    )
    assert not equal(first, tuned)
    unet = (
        *("experiment=folder", "size=digits_unet", "resolution=8", "patch_size=1"),
        *(*SMALL[6:], "max_steps=3", "out=unet", "preview.steps=2"),
    )
    done = in_process("train", *unet, root, BUCKETS)
    assert done.code == 0, done.err
    for wrong, told in (("3", "expected a multiple of 2"), ("[[8,8],[6]]", "[6]"), ("a", "step")):
        refused = in_process("train", *SMALL, root, f"data.buckets={wrong}", "max_steps=1")
        assert refused.code == 1 and told in refused.err and "Traceback" not in refused.err


def test_one_bucket_trains_as_none(train: Command, tmp_path: Path) -> None:
    own = (*SMALL, f"data.root={photos(tmp_path / 'photos')}", "max_steps=4")
    assert equal(train(*own, "out=none"), train(*own, "data.buckets=[[8,8]]", "out=one"))


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, *arguments: str) -> None:
    process = start(folder, *arguments)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed


@pytest.mark.slow  # processes that are killed, and one that is not
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    own = (*SMALL, shards(tmp_path), BUCKETS, "max_steps=60", "data.workers=1")
    finish(tmp_path, *own, "out=whole")
    chance, saved = random.Random(0), tmp_path / "killed" / "checkpoints"
    for _ in range(2):
        process, deadline = start(tmp_path, *own, "out=killed"), time.monotonic() + 120
        before = len([*saved.glob("step-*")]) and max(saved.glob("step-*")).name
        while process.poll() is None and time.monotonic() < deadline:
            if saved.exists() and any(each.name > str(before) for each in saved.glob("step-*")):
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
    finish(tmp_path, *own, "out=killed")
    assert equal(tmp_path / "whole", tmp_path / "killed")


NOISELESS = '''
import torch

from sag_dit.training.objective import MSE


class Fixed(MSE):
    """The loss at one level and noise, which ranks would otherwise draw for themselves."""

    def losses(self, denoiser, x_0, cond, level, eps):
        half = denoiser.process.time_at(torch.full((len(x_0),), 0.5))
        return super().losses(denoiser, x_0, cond, denoiser.process.level(half), x_0.flip(-1))
'''


@pytest.mark.slow  # two ranks are two processes
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "noiseless.py").write_text(NOISELESS)
    own = (
        *(*SMALL, shards(tmp_path), BUCKETS, "max_steps=6", "data.flip=true"),
        *("objective._target_=noiseless.Fixed", "model.class_dropout_prob=0"),
        # So large an epsilon that rounding stays rounding.
        *("+optimizer.eps=1e-2", "optimizer.lr=1e-2", "preview.guidance.sag=null"),
    )
    finish(tmp_path, *own, "out=one", "trainer.devices=1")
    finish(tmp_path, *own, "out=two", "trainer.devices=2", "trainer=ddp")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, there in one.items():
        assert_near(two[name], there)
