"""``sample.py``: the folder belongs to what determines pixels."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from sag_dit.cli.composing import compose
from sag_dit.cli.keys import Sample
from sag_dit.cli.sample import Plan, make_plan
from sag_dit.denoiser import ClassConditional
from sag_dit.files import using

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_out_of_other_settings_is_refused_with_the_difference(
    sample: Command, contents: Contents
) -> None:
    folder = sample("num_images=2", "out=mine").folder()
    before = contents(folder)
    other = sample("num_images=2", "out=mine", "steps=5", "guidance.sag.threshold=1.5")
    assert other.code == 1
    assert "steps: there 4, now 5" in other.err
    assert "guidance.sag.threshold: there 1.0, now 1.5" in other.err
    assert "request" not in other.err  # what agrees is not listed
    assert other.evaluations == 0
    assert contents(folder) == before


def test_told_to_stop_it_stops_and_goes_on_later(
    sample: Command, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of a run, which Lightning's own handler would let pass."""
    arguments = ("num_images=6", "gallery.num=0", "sag_scale=0.5")
    whole = contents(sample(*arguments).folder())
    asked = 0
    evaluate = ClassConditional.evaluate

    def terminated(self: ClassConditional, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        if asked == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, x_t, t, cond)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(ClassConditional, "evaluate", terminated)
        stopped = sample(*arguments, "out=stopped")
    assert stopped.code == 143
    assert asked == 12
    assert signal.getsignal(signal.SIGTERM) == before
    rest = sample(*arguments, "out=stopped")
    assert 0 < rest.evaluations < 6 * 4 * 2
    images = {name: sha for name, sha in whole.items() if name.endswith(".png")}
    assert images.items() <= contents(rest.folder()).items()


def test_out_with_images_of_unknown_origin_is_refused(sample: Command, tmp_path: Path) -> None:
    foreign = tmp_path / "mine" / "images" / "000000.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"somebody's")
    outcome = sample("num_images=2", "out=mine")
    assert outcome.code == 1
    assert "out=mine holds images but no config.yaml" in outcome.err
    assert foreign.read_bytes() == b"somebody's"


def test_awkward_paths_go_all_the_way(
    in_process: Command, save_official: Callable[..., Path], tmp_path: Path
) -> None:
    ckpt = save_official(tmp_path / "step=3, loss=0.5 (it's ${best}).pt")
    arguments = (f"ckpt={ckpt}", "steps=2", "num_images=1", "batch_size=1")
    for out in ("a=b, (c)", "it's", "${oc.env:HOME}", "x/${HOME}", "\\${x}", "ünï ✓"):
        outcome = in_process("sample", *arguments, f"out={out}")
        assert outcome.code == 0, outcome.err
        assert (tmp_path / out / "images" / "000000.png").exists()
        record = yaml.safe_load((tmp_path / out / "config.yaml").read_text(encoding="utf-8"))
        assert (record["config"]["ckpt"], record["config"]["out"]) == (str(ckpt), out)
    named = in_process("sample", *arguments)
    assert named.code == 0, named.err
    assert re.fullmatch(r"[\w.+=-]+-[0-9a-f]{8}", named.folder().name)


def plan_of(ckpt: Path, *overrides: str) -> Plan:
    config: Sample = compose("sample", [f"ckpt={ckpt}", *overrides])
    return make_plan(config, config.num_images, config.out)


@pytest.fixture(scope="module")
def usual(tiny: Path) -> Path:
    """The folder of the tiny model at its defaults."""
    return plan_of(tiny).folder.path


@pytest.mark.parametrize(
    "override",
    [
        "steps=49",
        "seed=1",
        "classes=[1]",
        "classes=random",
        "sag_scale=0.9",
        "cfg_scale=1.5",
        "blur_scale=0.1",
        "guidance.sag.layer=blocks.0",
        "guidance.sag.interval=[0.2,0.8]",
        "guidance.sag.blur_sigma=2",
        "sampler=ddpm",
        "sampler.eta=0.5",
        "batch_size=8",
        "trainer.precision=bf16-mixed",
    ],
)
def test_the_folder_is_named_by_what_determines_pixels(
    tiny: Path, usual: Path, override: str
) -> None:
    assert plan_of(tiny, override).folder.path != usual


@pytest.mark.parametrize(
    "override",
    [
        "num_images=3",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "logger=wandb",
        "npz=true",
        "gallery.num=0",
        "guidance.sag.layer=blocks.1.attn",  # what auto means
        "batch_size=16",  # the default
        "guidance.cfg.channels=3",  # of a term that is off
    ],
)
def test_the_folder_is_not_named_by_anything_else(tiny: Path, usual: Path, override: str) -> None:
    assert plan_of(tiny, override).folder.path == usual


def test_the_folder_is_named_by_the_weights_not_by_where_they_lie(
    usual: Path, save_official: Callable[..., Path], tmp_path: Path
) -> None:
    same = save_official(tmp_path / "tiny.pt")
    assert plan_of(same).folder.path == usual
    other = save_official(tmp_path / "tiny.pt", seed=1)
    assert plan_of(other).folder.path != usual


def test_a_folder_in_use_is_refused_before_anything_is_drawn(
    sample: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with using(out):
        refused = sample("num_images=2", "out=run")
    assert (refused.code, refused.evaluations) == (1, 0)
    assert "another run is using this folder: run" in refused.err
    assert sample("num_images=2", "out=run").code == 0
    assert not (out / ".lock").exists()


def test_a_finished_folder_that_cannot_be_written_to_succeeds(
    sample: Command, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample("num_images=2", "out=run", "gallery.num=1")
    before = contents(tmp_path / "run")
    access = os.access
    # Root may write wherever it is.
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
        again = sample("num_images=2", "out=run", "gallery.num=1")
        more = sample("num_images=3", "out=run", "gallery.num=1")
        npz = sample("num_images=2", "out=run", "gallery.num=1", "npz=true")
    assert (again.code, again.evaluations) == (0, 0)
    # Twins cost nothing where nothing is drawn.
    told = first.out.splitlines()
    assert again.out.splitlines() == [line for line in told if not line.startswith(" ")]
    assert more.code == 1 and "1 images are missing, and nothing can be written" in more.err
    assert npz.code == 1 and "npz=true asks for samples.npz, and nothing can be" in npz.err
    assert contents(tmp_path / "run") == before


def test_images_that_have_changed_are_drawn_again(
    sample: Command, contents: Contents, tmp_path: Path
) -> None:
    arguments = ("num_images=5", "out=run", "gallery.num=2")
    assert sample(*arguments).code == 0
    before, images = contents(tmp_path / "run"), tmp_path / "run" / "images"
    (images / "000001.png").write_bytes(b"")
    (images / "000004.png").write_bytes((images / "000003.png").read_bytes()[:50])
    again = sample(*arguments)
    assert "2 of 5 finished images are not what was written" in again.out
    assert contents(tmp_path / "run") == before
    # Of the same size, so that the hash alone tells.
    content = bytearray((images / "000000.png").read_bytes())
    content[-20] ^= 1
    (images / "000000.png").write_bytes(content)
    assert sample(*arguments, "gallery.num=0").evaluations == 0
    assert sample(*arguments, "verify=true").code == 0
    after = contents(tmp_path / "run")
    assert {k: v for k, v in after.items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }
