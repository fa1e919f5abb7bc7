"""Misuse ends with one screen that names the value and the remedy: no traceback, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sag_dit.cli.composing import compose
from sag_dit.cli.values import check_requests

Command = Callable[..., Any]
SaveOfficial = Callable[..., Path]

SCREEN = 32
"""Lines; Hydra lists the choices of a group one a line."""


def assert_refused(outcome: Any, *parts: str) -> None:
    """It failed with an error that fits a screen and says all of ``parts``."""
    assert outcome.code == 1, outcome.out + outcome.err
    error = outcome.err[outcome.err.index("error: ") :]
    assert len(error.splitlines()) <= SCREEN
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in error


# Each is refused before anything is written.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    # name the value and what was expected
    "steps=0": ("steps=0", "1"),
    "steps=-3": ("steps=-3", "1"),
    "steps=1001": ("steps=1001", "1 to 1000"),
    "steps=abc": ("steps", "abc", "expected"),
    "steps=2.5": ("steps", "2.5", "expected"),
    "steps=null": ("steps=null", "expected"),
    "num_images=0": ("num_images=0", "1 or more"),
    "num_images=1.5": ("num_images", "1.5", "expected"),
    "num_images=many": ("num_images", "many", "expected"),
    "batch_size=0": ("batch_size=0", "1 to 65,536"),
    "batch_size=-1": ("batch_size=-1", "1 to 65,536"),
    "batch_size=big": ("batch_size", "big", "expected"),
    "max_rows=0": ("max_rows=0", "1 or more"),
    "gallery.num=-1": ("gallery.num=-1", "0 or more"),
    "gallery.num=all": ("gallery.num", "all", "expected"),
    "seed=-1": ("seed=-1", "0 to 2^64 - 1"),
    "seed=18446744073709551616": ("seed=18446744073709551616", "0 to 2^64 - 1"),
    "seed=1.5": ("seed", "1.5", "expected"),
    "seed=lucky": ("seed", "lucky", "expected"),
    "sag_scale=strong": ("scale", "strong", "expected"),
    "sag_scale=nan": ("scale", "nan", "expected"),
    "cfg_scale=null": ("cfg_scale=null", "expected"),
    "guidance.sag.threshold=high": ("threshold", "high", "expected"),
    "guidance.sag.interval=[0.8,0.2]": ("interval=(0.8, 0.2)", "0 <= start <= stop <= 1"),
    "guidance.sag.interval=3": ("interval",),
    "guidance.sag.kernel_size=4": ("kernel_size=4", "odd"),
    "guidance.sag.layer=blocks.9": ("'blocks.9'", "blocks.0.attn, blocks.1.attn, blocks.2.attn"),
    "guidance.cfg.channels=4 cfg_scale=1.5": ("channels=4", "3 channels"),
    "+guidance.mine={scale:1}": ("guidance.mine", "_target_"),
    "+guidance.mine={_target_:builtins.dict}": ("guidance.mine", "Term"),
    "+guidance.mine={_target_:no.such.Term}": ("no.such.Term", "guidance.mine"),
    "classes=10": ("class 10", "0 to 9"),
    "classes=[3,-1]": ("class -1", "0 to 9"),
    "classes=cat": ("class 'cat'", "'0', '1'"),
    "classes=[1.5]": ("classes=[1.5]", "expected numbers or names"),
    "classes=[null]": ("classes=[null]", "expected numbers or names"),
    "classes=[]": ("classes=[]", "at least one"),
    "sampler.eta=2": ("eta=2", "0 (deterministic) to 1"),
    "sampler=kdpm2_ancestral steps=5": ("steps=5", "10 or more"),
    "ema=false": ("ema=false", "one set of weights"),
    "requests=nowhere.csv num_images=16": ("requests=nowhere.csv", "no such file"),
    # what would have no effect
    "requests=a.csv": ("num_images=2 beside requests=a.csv", "leave num_images out"),
    "requests=a.csv num_images=16 seed=4": ("seed=4 beside requests", "leave seed out"),
    "requests=a.csv num_images=16 classes=3": ("classes=3 beside requests", "leave classes out"),
    "text.guidance=4": ("text.guidance=4", "asked with classes", "leave it out"),
    "text.negative=grey": ("text.negative=grey", "asked with classes"),
    "guidance.sag.interval_in=t": ("interval=(0.0, 1.0) in t", "999", "interval_in=progress"),
    # Hydra's own message and the nearest keys
    "sag_scael=1": ("sag_scael=1: no such key", "Did you mean sag_scale"),
    "guidance.sag.layr=1": ("guidance.sag.layr: no such key", "guidance.sag.layer"),
    "trainer.devcies=2": ("trainer.devcies=2: ", "takes no devcies", "Did you mean devices"),
    "gallery.number=2": ("gallery.number=2: no such key", "gallery.num"),
    # Hydra's own message and the choices there are
    "sampler=ddmi": ("sampler=ddmi: expected one of", "ddim", "ddpm"),
    "guidance=defalt": ("guidance=defalt: expected one of", "default"),
    "logger=wanbd": ("logger=wanbd: expected one of", "wandb"),
    "trainer=fast": ("trainer=fast: expected one of", "auto"),
}


@pytest.mark.parametrize("arguments", SETTINGS)
def test_settings_are_refused_before_anything_is_written(
    sample: Command, tmp_path: Path, arguments: str
) -> None:
    outcome = sample("num_images=2", "out=o", *arguments.split(" "))
    assert_refused(outcome, *SETTINGS[arguments])
    assert outcome.evaluations == 0
    assert not (tmp_path / "o").exists()


def test_seeds_beside_requests() -> None:
    """Each line has a seed of its own, so more seeds would draw the same images again."""
    for keys, told in (("seeds=3 num_images=300", "seeds=3"), ("num_images=7", "num_images=7")):
        arguments = ["ckpt=digits", "requests=a.csv", *keys.split()]
        with pytest.raises(ValueError, match=f"{told} beside requests=a.csv"):
            check_requests(compose("evaluate", arguments))
    check_requests(compose("evaluate", ["ckpt=digits", "requests=a.csv", "num_images=300"]))


TRAINER = {
    "trainer.devices=0": ("devices=0",),
    "trainer.precision=31": ("31", "32-true"),
    "trainer.strategy=fast": ("fast",),
    **({} if torch.cuda.is_available() else {"trainer.accelerator=gpu": ("gpu",)}),
}


@pytest.mark.parametrize("argument", TRAINER)
def test_what_lightning_refuses(sample: Command, argument: str) -> None:
    outcome = sample("num_images=2", "trainer.accelerator=cpu", argument)
    assert_refused(outcome, *TRAINER[argument])
    assert outcome.evaluations == 0


def test_unknown_checkpoint(in_process: Command) -> None:
    outcome = in_process("sample", "ckpt=digit")
    assert_refused(outcome, "ckpt='digit'", "did you mean digits", "expected a published name")


def test_misspelt_file(in_process: Command, tiny: Path) -> None:
    missing = tiny.with_name("tinny.pt")
    assert_refused(in_process("sample", f"ckpt={missing}"), f"looked for {missing}")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def a_text(file: Path) -> None:
    file.write_text("weights will follow")


def a_web_page(file: Path) -> None:
    file.write_text("<!doctype html><title>403</title>")


def nothing(file: Path) -> None:
    file.write_bytes(b"")


class Evil:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, ("touch unpickled",)


def code(file: Path) -> None:
    torch.save({"ema": Evil()}, file)


def other_weights(file: Path) -> None:
    torch.save(torch.nn.Linear(3, 3).state_dict(), file)


def no_weights(file: Path) -> None:
    torch.save([1, 2, 3], file)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (cut_short, ("damaged, cut short",)),
        (a_text, ("begins with b'weights will",)),
        (a_web_page, ("web page",)),
        (nothing, ("empty",)),
        (code, ("refused", "holds Python objects")),
        (other_weights, ("not a DiT", "pos_embed")),
        (no_weights, ("holds a list",)),
    ],
)
def test_damaged_and_foreign_files(
    in_process: Command,
    save_official: SaveOfficial,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    parts: tuple[str, ...],
) -> None:
    file = save_official(tmp_path / "bad.pt")
    spoil(file)
    outcome = in_process("sample", f"ckpt={file}", "out=o")
    assert_refused(outcome, str(file), "expected", *parts)
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "unpickled").exists()


def test_a_config_of_another_depth_is_named(
    in_process: Command, save_official: SaveOfficial, tmp_path: Path
) -> None:
    file = save_official(tmp_path / "deep.pt", depth=2)
    file.with_suffix(".json").write_text(json.dumps({"model": {"num_heads": 3, "depth": 4}}))
    outcome = in_process("sample", f"ckpt={file}")
    assert_refused(outcome, str(file), "its config says depth=4", "its weights are of depth=2")


def test_guidance_without_a_null_class(
    in_process: Command, save_official: SaveOfficial, tmp_path: Path
) -> None:
    stated = {"model": {"num_classes": 10}}
    file = save_official(tmp_path / "always.pt", class_dropout_prob=0.0, stated=stated)
    arguments = (f"ckpt={file}", "steps=2", "num_images=2", "batch_size=2", "out=o")
    refused = in_process("sample", *arguments, "cfg_scale=1.5")
    assert_refused(refused, "cfg_scale=1.5", "no null condition", "cfg_scale=1")
    assert not (tmp_path / "o").exists()
    assert in_process("sample", *arguments, "cfg_scale=1").code == 0


def test_out_is_a_file(sample: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    outcome = sample("num_images=1", "out=taken")
    assert_refused(outcome, "out=taken", "choose another out")
    assert outcome.evaluations == 0
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("out", ["taken/below", "/proc/sag_dit"])
def test_out_cannot_be_written(sample: Command, tmp_path: Path, out: str) -> None:
    (tmp_path / "taken").write_text("mine")
    outcome = sample("num_images=1", f"out={out}")
    assert_refused(outcome, f"out={out}", "choose another out")
    assert outcome.evaluations == 0


def broken(value: float, label: int) -> Callable[[dict[str, Tensor]], None]:
    """Spoil what a model knows of one class, so that only its images break."""

    def change(state: dict[str, Tensor]) -> None:
        state["y_embedder.embedding_table.weight"][label] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_breaks_is_named_and_not_written(
    in_process: Command, save_official: SaveOfficial, tmp_path: Path, value: float
) -> None:
    file = save_official(tmp_path / "broken.pt", change=broken(value, label=2))
    arguments = (f"ckpt={file}", "steps=3", "batch_size=1", "num_images=5", "out=o")
    outcome = in_process("sample", *arguments)
    assert_refused(outcome, "image 2 became NaN or infinite at step 1 of 3 (t = 999.0)")
    written = sorted(path.name for path in (tmp_path / "o").glob("*/*.png"))
    assert written == ["000000.png"] * 2 + ["000001.png"] * 2  # images and their twins
    for path in (tmp_path / "o" / "images").iterdir():
        with Image.open(path) as image:
            image.load()
    assert not (tmp_path / "o" / "manifest.jsonl").exists()


# The same at a true command line, in a process of its own.


def test_misspelt_key_at_the_command_line(in_other_process: Command) -> None:
    outcome = in_other_process("sag_scal=1.0")
    assert_refused(outcome, "sag_scal=1.0: no such key", "Did you mean sag_scale")
    assert outcome.out == ""


@pytest.mark.slow
def test_latents_that_break_at_the_command_line(
    in_other_process: Command, save_official: SaveOfficial, tmp_path: Path
) -> None:
    file = save_official(tmp_path / "a=b (1).pt", change=broken(float("nan"), label=1))
    arguments = (f"ckpt={file}", "steps=2", "batch_size=1", "num_images=3", "out=c,d")
    outcome = in_other_process(*arguments)
    assert_refused(outcome, "image 1 became NaN")
    assert (tmp_path / "c,d" / "images" / "000000.png").exists()
