"""The examples of docs/pipelines.md, and of the README, run on tiny pipelines of each family."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sag_dit
from sag_dit.cli import app
from sag_dit.cli import sample as cli
from sag_dit.sampler import EulerFlow
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(kind: str, part: str, *files: str) -> list[str]:
    """The code of one kind in these files that holds ``part``."""
    found = [match for file in files for match in BLOCK.findall((ROOT / file).read_text())]
    return [text for language, text in found if language == kind and part in text]


GUIDED = blocks("python", "guide(pipe", "docs/pipelines.md", "README.md")
NATIVE = blocks("python", "load_text(", "docs/pipelines.md")
COMMANDS = [
    line
    for text in blocks("bash", "ckpt=FOLDER", "docs/pipelines.md")
    for line in text.splitlines()
]


class Short:
    """A pipeline that is called with its own arguments and what makes a tiny one quick."""

    def __init__(self, pipe: Any, family: str) -> None:
        self.pipe = pipe
        self.family = family
        self.calls = 0

    def __call__(self, prompt: str, **options: Any) -> Any:
        self.calls += 1
        options = {"num_inference_steps": 2, **tiny.CALLS[self.family], **options}
        if self.family == "dit":
            return self.pipe([1], **options)
        return self.pipe(prompt, height=16, width=16, **options)


def test_there_are_examples() -> None:
    assert len(GUIDED) >= 3
    assert (len(NATIVE), len(COMMANDS)) == (1, 2)


@pytest.mark.parametrize("family", list(tiny.BUILD), indirect=True)
def test_guided_pipelines(pipe: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, short = sag_dit.guide, Short(pipe, family)

    def guide_what_is_short(_: Short, *terms: Any, **options: Any) -> Any:
        return guide(pipe, *terms, **options)

    monkeypatch.setitem(vars(sag_dit), "guide", guide_what_is_short)
    names: dict[str, Any] = {"pipe": short}
    for example in GUIDED:
        if family == "flux" and "APG" in example:
            with pytest.raises(ValueError, match="true_cfg_scale"):
                exec(example, names)
            continue
        exec(example, names)
        assert len(names.pop("images")) == 1
    assert short.calls == len(GUIDED) - (family == "flux")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of Stable Diffusion 3 and a file of requests, in a place of their own."""
    tiny.sd3(medium=False).save_pretrained(tmp_path / "FOLDER")
    (tmp_path / "FILE").write_text('seed,prompt\n5,a corgi\n6,"a castle, seen from afar"\n')
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "FOLDER"


def test_a_text_model_from_python(folder: Path) -> None:
    (example,) = NATIVE
    names: dict[str, Any] = {"sag_dit": sag_dit, "SAG": sag_dit.SAG, "folder": folder}
    exec(example, {**names, "size": (16, 16), "steps": 2, "sampler": EulerFlow()}, names)
    assert names["images"].shape == (1, 3, 16, 16)
    assert names["images"].dtype == torch.uint8


def draw(*arguments: str) -> None:
    short = ["steps=2", "text.size=[16,16]", "sampler=euler_flow", "trainer.accelerator=cpu"]
    app.launch("sample", cli.run_sample, [*arguments, *short])


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "sample.py")
        # A file of requests says itself how many.
        draw(*arguments, *["num_images=2"] * ("requests=FILE" not in arguments))
        gallery = Path(capsys.readouterr().out.split("gallery: ")[1].strip())
        assert gallery.is_file()
    manifest = (gallery.parent / "manifest.jsonl").read_text()
    assert "a castle, seen from afar" in manifest
    assert len(list((gallery.parent / "images").iterdir())) == 2
    images = {path.name: path.stat().st_mtime_ns for path in (gallery.parent / "images").iterdir()}
    draw(*arguments)
    again = {path.name: path.stat().st_mtime_ns for path in (gallery.parent / "images").iterdir()}
    assert again == images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=FOLDER"], "a text model, StableDiffusion3Pipeline; pass prompt="),
        (["ckpt=digits", "prompt=a corgi"], "takes no prompt"),
        (["ckpt=FOLDER", "prompt=a corgi", "classes=[0]"], "prompt: expected it alone"),
        (["ckpt=FOLDER", "prompt=a corgi", "ema=false"], "ema=false"),
    ],
)
def test_misuse_is_told(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        app.launch("sample", cli.run_sample, arguments)
    assert message in capsys.readouterr().err
