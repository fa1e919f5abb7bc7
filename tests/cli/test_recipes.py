"""A command and the Python that tell how images are drawn both draw these, bit for bit."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sag_dit
from sag_dit.cli.composing import compose, make
from sag_dit.cli.presets import with_presets
from sag_dit.cli.typed import choices
from sag_dit.guidance import APG, CFG, FDG, ICG, PAG, SAG, Autoguidance, BlurGuidance, Cache
from sag_dit.output.telling import Recipe, command, how, python
from sag_dit.sampler import DDIM, Ancestral, StridedDDIM
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.pipelines import tiny

Command = Callable[..., Any]
FEW = Recipe("digits", DDIM(), steps=3, num_classes=10, num_images=2, batch_size=2)
RECIPES = {
    "unguided": FEW,
    "sag": replace(FEW, guidance={"sag": SAG(0.5)}),
    "not the preset's": replace(
        FEW,
        guidance={
            "cfg": CFG(1.5),
            "sag": SAG(0.75, layer=[1, "blocks.3"], interval=(0.25, 1.0), quantile=0.5),
        },
        classes=["7", 2],
        seed=2**63,
    ),
    "several, cycled": replace(
        FEW,
        guidance={"sag": SAG(1.0, heads=2), "pag": PAG(2.0, layers=0), "fdg": FDG(2.0, low=1.5)},
        sampler=StridedDDIM(0.5),
        steps=4,
        classes=[3, 7],
        num_images=3,
    ),
    "random classes": replace(
        FEW, classes="random", seed=5, sampler=Ancestral(), guidance={"icg": ICG(1.5)}
    ),
    "all classes and more": replace(FEW, num_images=11, batch_size=4, classes=None),
    "one class": replace(FEW, classes=3, guidance={"apg": APG(1.5, momentum=-0.25)}),
    "two of a kind": replace(
        FEW,
        guidance={
            "sag": SAG(0.5, interval=(0.0, 0.5)),
            "later": SAG(1.0, layer=1, interval=(0.5, 1.0), schedule="cosine"),
        },
    ),
    "blur": replace(FEW, guidance={"blur": BlurGuidance(0.5, blur_sigma=1e-05, kernel_size=None)}),
}


def drawn_by(run: Command, line: str) -> tuple[list[np.ndarray], Path]:
    program, script, *arguments = shlex.split(line)
    assert (program, script) == ("python", "sample.py")
    outcome = run("sample", *with_presets("sample", arguments), "gallery.num=0")
    assert outcome.code == 0, outcome.err
    files = sorted((outcome.folder() / "images").iterdir())
    return [np.asarray(Image.open(file)) for file in files], outcome.folder()


def drawn_in_python(code: str) -> list[np.ndarray]:
    names: dict[str, Any] = {}
    exec(code, names)
    return [image.permute(1, 2, 0).squeeze().numpy() for image in names["out"].tensor]


def assert_both_draw_the_same(run: Command, recipe: Recipe) -> None:
    by_command, _ = drawn_by(run, command(recipe))
    in_python = drawn_in_python(python(recipe))
    assert len(by_command) == len(in_python) == recipe.num_images
    for one, other in zip(by_command, in_python, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", RECIPES)
def test_command_and_python_draw_the_same(name: str, in_process: Command) -> None:
    assert_both_draw_the_same(in_process, RECIPES[name])


def test_the_gallery_tells_what_draws_the_same_images(in_process: Command) -> None:
    arguments = ["ckpt=digits", "steps=3", "num_images=2", "batch_size=2", "cfg_scale=1.5"]
    outcome = in_process("sample", *with_presets("sample", [*arguments, "seed=3"]))
    page = (outcome.folder() / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    preset = "SAG 0.3 in the first half, layer 3, blur sigma 0.5, beside CFG 1.5"
    assert data["words"] == f"{preset}; 3 steps of ddim, seed 3"
    assert data["spared"] == "all but SAG"
    # The command means the same run, and Python the same pixels.
    drawn, folder = drawn_by(in_process, data["command"])
    assert folder == outcome.folder()
    for one, other in zip(drawn, drawn_in_python(data["python"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_models_that_are_named(
    in_process: Command, save_official: Callable[..., Path], tmp_path: Path
) -> None:
    good = save_official(tmp_path / 'it\'s a=model, "really".pt')
    worse = save_official(tmp_path / "worse [1].pt", seed=1)
    guidance = {"auto": Autoguidance(1.5, ckpt=str(worse)), "sag": SAG(0.5)}
    sampler = DiffusersSampler("dpmpp_2m")
    recipe = replace(FEW, ckpt=str(good), guidance=guidance, sampler=sampler)
    assert_both_draw_the_same(in_process, replace(recipe, loading={"num_heads": 3}))


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_a_prompt_of_a_text_model(in_process: Command, tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path / "text")
    recipe = replace(FEW, ckpt=str(tmp_path / "text"), prompt="a corgi, it's small", steps=2)
    loading = {"negative_prompt": "a [cat]", "size": (16, 32)}
    guidance = {"cfg": CFG(3.0), "sag": SAG(0.75, layer=2)}
    assert_both_draw_the_same(in_process, replace(recipe, loading=loading, guidance=guidance))


def test_the_gallery_says_what_has_no_short_form(in_process: Command, tmp_path: Path) -> None:
    (tmp_path / "lines.csv").write_text("5,3\n6,7\n")
    few = ["ckpt=digits", "steps=2", "batch_size=2", "sag_scale=0", "requests=lines.csv"]
    outcome = in_process("sample", *few)
    page = (outcome.folder() / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["python"] == "# requests=lines.csv: model.sample does not take it, sample.py does"
    assert data["words"] == "no guidance; 2 steps of ddim"
    assert drawn_by(in_process, data["command"])[1] == outcome.folder()


def test_a_method_of_ones_own(
    in_process: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "louder.py").write_text(
        "from dataclasses import dataclass\n"
        "from sag_dit.guidance import Term\n"
        "@dataclass(frozen=True)\n"
        "class Louder(Term):\n"
        "    kind: str = 'much'\n"
        "    def contribution(self, ask):\n"
        "        (base,) = yield (ask.base,)\n"
        "        return self.scale * base.v\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "louder", raising=False)
    louder = make({"_target_": "louder.Louder", "scale": 0.25, "kind": "a, b"}, "guidance.loud")
    assert_both_draw_the_same(in_process, replace(FEW, guidance={"loud": louder}))


@pytest.mark.parametrize("choice", sorted({*choices("sampler")} - {"auto"}))
def test_every_sampler_is_chosen_by_its_name(choice: str) -> None:
    sampler = make(compose("sample", [f"sampler={choice}"]).sampler, "sampler")
    _, _, *arguments = shlex.split(command(replace(FEW, sampler=sampler)))
    assert f"sampler={choice}" in arguments
    assert make(compose("sample", arguments).sampler, "sampler") == sampler


@pytest.mark.parametrize(
    "name",
    ["cat face", "3", "null", "a,b", "it's", "both \"and' \\", "${seed}", "flags [red]", "é"],
)
def test_names_of_classes_are_read_back(name: str) -> None:
    recipe = replace(FEW, classes=[name, 4], prompt=None)
    _, _, *arguments = shlex.split(command(recipe))
    assert compose("sample", arguments).classes == [name, 4]


@pytest.mark.parametrize(
    "prompt", ["a red fox, sitting", "'quoted'", "", "[x]", "{a: b}", "$5 ${x}"]
)
def test_prompts_are_read_back(prompt: str) -> None:
    recipe = replace(FEW, prompt=prompt, loading={"negative_prompt": prompt, "size": (64, 32)})
    _, _, *arguments = shlex.split(command(recipe))
    read = compose("sample", arguments)
    assert (read.prompt, read.text.negative, read.text.size) == (prompt, prompt, [64, 32])


def test_shared_prefixes_are_in_the_command_and_in_python() -> None:
    recipe = replace(FEW, share_prefixes=True)
    _, _, *arguments = shlex.split(command(recipe))
    assert compose("sample", arguments).share_prefixes is True
    assert "share_prefixes=True" in python(recipe)
    assert "share_prefixes" not in command(FEW) + python(FEW)


@pytest.mark.parametrize("cache", [Cache(2), Cache(3, order=1)])
def test_a_cache_is_in_the_command_in_python_and_in_words(cache: Cache) -> None:
    recipe = replace(FEW, cache=cache)
    _, _, *arguments = shlex.split(command(recipe))
    read = compose("sample", arguments).cache
    assert (read.every, read.order) == (cache.every, cache.order)
    assert f"cache=Cache(every={cache.every}" in python(recipe)
    assert "from sag_dit import Cache" in python(recipe)
    assert f"blocks every {cache.every} steps" in how(recipe, sag_dit.load("digits").denoiser)
    off = replace(FEW, cache=Cache(1, order=1))
    assert command(off) + python(off) == command(FEW) + python(FEW)


def test_settings_without_a_short_form_in_python_are_in_the_command() -> None:
    beside = {"max_rows": 64, "trainer.precision": "bf16-mixed", "requests": "lines.csv"}
    _, _, *arguments = shlex.split(command(replace(FEW, beside=beside)))
    read = compose("sample", arguments)
    assert (read.max_rows, read.trainer["precision"], read.requests) == (
        64,
        "bf16-mixed",
        "lines.csv",
    )
