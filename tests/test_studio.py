"""The studio without a browser: what its controls say is what the API and the commands draw."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sag_dit.api import load
from sag_dit.checkpoints import write_safetensors
from sag_dit.cli.keys import COMMANDS
from sag_dit.methods import methods
from sag_dit.output.folder import read_png
from sag_dit.output.telling import command, preset
from sag_dit.sampler import DDIM, Ancestral, own_samplers
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.cli.conftest import ROOT
from tests.pipelines import tiny

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[studio]'")

from sag_dit.studio import controls, grids, opening  # noqa: E402
from sag_dit.studio.asking import Asked, RefusedError  # noqa: E402
from sag_dit.studio.controls import knobs  # noqa: E402
from sag_dit.studio.library import Library  # noqa: E402
from sag_dit.studio.serving import Gate  # noqa: E402


def shown(**changes: Any) -> list[Any]:
    """What all controls hold, some of them changed by their paths with ``__`` for a dot."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return [given.get(knob.path, knob.shown(knob.default)) for knob in knobs()]


def test_every_method_and_every_setting_has_a_control() -> None:
    found = {(knob.method, knob.settled) for knob in knobs()}
    expected = {(method.key, name) for method in methods() for name in ("scale", *method.settings)}
    assert found == expected


def test_controls_at_their_defaults_guide_nothing_and_say_what_they_show() -> None:
    said = controls.guidance(knobs(), shown())
    assert Asked("digits", "3", guidance=said).terms() == {}
    for method in methods():
        stated = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in said[method.key].items()
        }
        expected = {"scale": method.neutral, **method.settings}
        assert {key: _same(each) for key, each in stated.items()} == {
            key: _same(each) for key, each in expected.items()
        }


def _same(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def test_what_a_configuration_states_comes_back_from_the_controls() -> None:
    wanted = {
        "sag": {"scale": 0.7, "interval": [0.1, 0.6], "layer": "blocks.2", "quantile": 0.4},
        "pag": {"scale": 9.0, "layers": ["blocks.0", 3, "blocks.9"], "schedule": "cosine"},
        "cfg": {"scale": 2.0, "interval": [None, 400.0], "interval_in": "t"},
        "seg": {"scale": 1.0, "blur_sigma": 3.0},
    }
    updates = controls.set_to(knobs(), wanted, load("digits").denoiser)
    said = controls.guidance(knobs(), [each["value"] for each in updates])
    assert said["sag"]["interval"] == (0.1, 0.6) and said["sag"]["layer"] == "blocks.2.attn"
    assert (
        said["pag"]["layers"] == ("blocks.0.attn", "blocks.3.attn", "blocks.9")
        and said["pag"]["scale"] == 9.0
    )
    assert said["cfg"]["interval"] == (0.0, 400.0) and said["cfg"]["interval_in"] == "t"
    assert said["seg"]["blur_sigma"] == 3.0 and said["sag"]["quantile"] == 0.4
    for knob, update in zip(knobs(), updates, strict=True):
        if knob.kind == "scale":
            assert update["value"] <= update.get("maximum", knob.most)
        if knob.kind == "layers":  # Each once, beside one that the model does not have.
            strange = ["blocks.9"] * (knob.method == "pag")
            assert update["choices"] == ["auto", *(f"blocks.{i}.attn" for i in range(4)), *strange]


def test_every_option_of_a_sampler_has_a_control_that_stands_for_all_who_have_it() -> None:
    known = {knob.name: knob for knob in controls.sampler_knobs()}
    for kind in own_samplers().values():
        for each in fields(kind):  # type: ignore[arg-type]
            assert known[each.name].default == each.default, (kind, each.name)
    assert known["eta"].told and known["last_step"].told and known["shift"].optional


def test_a_sampler_takes_its_own_options_and_refuses_in_its_name() -> None:
    process = load("digits").denoiser.process
    given = {"eta": 0.25, "shift": 2.0, "variance": "fixed_small"}
    asked = Asked("digits", "3", steps=8, options=given)
    assert asked.solver(process) == DDIM(0.25)
    assert asked.changed("sampler", "ddpm").solver(process) == Ancestral("fixed_small")
    assert asked.changed("sampler", "unipc").solver(process) == DiffusersSampler("unipc")
    wrong = asked.changed("sampler.eta", 2.0)
    for refused, told in (
        (wrong, "eta=2.0: expected 0"),
        (asked.changed("sampler", "euler_flow"), "solves flow models only"),
        (asked.changed("sampler", "ddim_strided").changed("steps", 300), "no whole stride"),
    ):
        with pytest.raises(RefusedError, match=told) as caught:
            refused.drawing(load("digits"))
        assert caught.value.method == "sampler"


def test_a_strip_over_an_option_of_the_sampler() -> None:
    knobs_ = [*controls.sampler_knobs(), *knobs()]
    assert "sampler.eta" in grids.keys(knobs_)
    values = grids.values_of("sampler.eta", "0, 1", knobs_)
    *_, strip = grids.Grid("sampler.eta", values).drawn(
        Asked("digits", "3", steps=3), load("digits")
    )
    assert strip.shown[0, 0] != strip.shown[0, 1] and not strip.twins


def test_what_cannot_be_read_names_its_key() -> None:
    with pytest.raises(RefusedError, match=r"seg.blur_sigma=wide: expected a number"):
        controls.guidance(knobs(), shown(seg__blur_sigma="wide"))
    said = controls.guidance(knobs(), shown(pag__heads="[[0, 3], [1]]"))
    assert said["pag"]["heads"] == [[0, 3], [1]]
    with pytest.raises(RefusedError, match=r"pag.heads=\[0, x: expected a list of numbers"):
        controls.guidance(knobs(), shown(pag__heads="[0, x"))
    with pytest.raises(RefusedError, match="number") as caught:
        controls.guidance(knobs(), shown(sag__threshold=None))
    assert caught.value.method == "sag"
    wrong = controls.guidance(knobs(), shown(pag__interval__0=0.9, pag__interval__1=0.2))
    with pytest.raises(RefusedError, match="start <= stop"):
        Asked("digits", "3", guidance=wrong).terms()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "auto"])
def test_command_and_preset_draw_what_the_page_draws(tmp_path: Path, sampler: str) -> None:
    model = load("digits")
    said = controls.guidance(
        knobs(),
        shown(sag__scale=0.8, sag__layer=["blocks.2"], cfg__scale=1.5, cfg__interval__1=0.5),
    )
    asked = Asked("digits", "7", count=2, seed=5, steps=3, sampler=sampler, guidance=said,
                  options={"eta": 0.5, "shift": 3.0})  # fmt: skip
    out = model.sample(**asked.drawing(model))
    text = preset(asked.recipe(model))
    values = yaml.safe_load(text)
    assert values.get("sampler") == (None if sampler == "dpmpp_2m" else {"eta": 0.5})
    assert values["guidance"]["sag"] == {"layer": "blocks.2"} and values["classes"] == ["7"]
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(text)
    told = shlex.split(command(asked.recipe(model)))[2:]
    for name, arguments in (
        ("preset", ["--config-dir", str(tmp_path / "configs"), "experiment=mine"]),
        ("command", told),
    ):
        more = [f"out={tmp_path / name}", "trainer.accelerator=cpu", "trainer.devices=1"]
        done = subprocess.run(
            [sys.executable, "-m", "sag_dit", "sample", *arguments, *more, "gallery.num=0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / name / "images").rglob("*.png"))
        images = np.stack([read_png(file) for file in files])
        assert np.array_equal(images, out.tensor.permute(0, 2, 3, 1).numpy()), name


def test_a_strip_has_one_twin_and_a_grid_two_keys() -> None:
    model = load("digits")
    asked = Asked("digits", "3", steps=2, guidance=controls.guidance(knobs(), shown()))
    values = grids.values_of("sag.scale", "0, 1.5", knobs())
    *_, strip = grids.Grid("sag.scale", values).drawn(asked, model)
    assert strip.twins[0] == strip.shown[0, 0] != strip.shown[0, 1]
    down = grids.values_of("seed", "1,2", knobs())
    *_, grid = grids.Grid("sag.interval.1", [0.0, 1.0], "seed", down).drawn(
        asked.changed("sag.scale", 2.0), model
    )
    assert len(grid.shown) == 4 and len(set(grid.twins.values())) == 2
    assert grid.twins[1] == grid.shown[1, 0] != grid.shown[1, 1]
    assert 'data-running="false"' in grid.page()


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        ("sag.scale", "", "expected values"),
        ("sag.scale", "0, much", "sag.scale=much: expected a number"),
        ("seed", "1.5", "whole numbers"),
        ("auto.ema", "yes", "true or false"),
        ("nothing", "1", "no such key"),
    ],
)
def test_values_that_a_grid_cannot_go_over_are_told(key: str, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grids.values_of(key, text, knobs())


def test_a_grid_has_an_end() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        grids.Grid("seed", range(65))
    with pytest.raises(ValueError, match="another key"):
        grids.Grid("seed", [1], "seed", [2])


def test_checkpoints_come_from_names_and_chosen_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "mine", tmp_path / "other"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    library = Library([inside])
    assert str(inside / "model.safetensors") in library.choices()
    with pytest.raises(ValueError, match="outside of the studio's folders"):
        library.load(str(outside / "model.safetensors"))
    (inside / "link.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(ValueError, match="outside"):
        library.load(str(inside / "link.safetensors"))
    with pytest.raises(ValueError, match="outside"):
        library.load(f"{inside}/../other/model.safetensors")
    with pytest.raises(ValueError, match="downloads nothing"):
        library.load("ADM-64")


def test_models_that_methods_name_are_loaded_from_there_alone(tmp_path: Path) -> None:
    model, library = load("digits"), Library([tmp_path])
    worse = load("digits")
    with torch.no_grad():
        for parameter in worse.denoiser.parameters():
            parameter.mul_(0.9)
    write_safetensors(tmp_path / "worse", worse.class_conditional)
    said = controls.guidance(knobs(), shown(auto__scale=2.0, auto__ckpt=str(tmp_path / "worse")))
    asked = Asked("digits", "3", steps=2, guidance=said)
    guided = model.sample(**asked.drawing(model, library.ready))
    plain = model.sample("3", steps=2, batch_size=1)
    assert not torch.equal(guided.tensor, plain.tensor)
    with pytest.raises(RefusedError, match="outside of the studio's folders") as caught:
        asked.drawing(model, Library().ready)
    assert caught.value.method == "auto"


def test_a_run_is_opened_with_its_settings_and_pictures(tmp_path: Path) -> None:
    arguments = ["ckpt=digits", "sag_scale=0.6", "guidance.sag.interval=[0.25,1]", "classes=[4]"]
    more = ["num_images=2", "steps=3", "seed=9", "sampler=ddim", "sampler.eta=0.5"]
    more += ["trainer.accelerator=cpu"]
    subprocess.run(
        [sys.executable, "-m", "sag_dit", "sample", *arguments, *more, "trainer.devices=1",
         f"out={tmp_path / 'run'}"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert opening.folders_of([tmp_path]) == [str(tmp_path / "run")]
    found = opening.open_folder(tmp_path / "run")
    assert (found.ckpt, found.label, found.seed, found.steps) == ("digits", "4", 9, 3)
    assert (found.sampler, found.options) == ("ddim", {"eta": 0.5}) and found.page.count(
        "<img"
    ) == 4
    assert found.guidance is not None
    updates = controls.set_to(knobs(), found.guidance, load("digits").denoiser)
    said = controls.guidance(knobs(), [each["value"] for each in updates])
    assert said["sag"]["scale"] == 0.6 and said["sag"]["interval"] == (0.25, 1.0)
    # A picture that leads out of the folder is not shown.
    secret = tmp_path / "secret.png"
    first = sorted((tmp_path / "run" / "images").rglob("*.png"))[0]
    first.rename(secret)
    first.symlink_to(secret)
    assert opening.open_folder(tmp_path / "run").page.count("<img") == 3
    with pytest.raises(ValueError, match="neither a run's folder"):
        opening.open_folder(tmp_path)


def test_an_evaluation_is_opened_as_its_table(tmp_path: Path) -> None:
    rows = [
        {
            "name": name,
            "metrics": {"fid": fid},
            "facts": {
                "model": "digits", "steps": 7, "seed": [2, 3], "sampler": "DDIM",
                "terms": {"sag": {"term": "sag", "scale": scale, "layer": "blocks.3.attn"}},
            },
        }
        for name, fid, scale in (("unguided", 9.5, 0.0), ("<b>SAG</b>", 8.25, 0.4))
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    assert opening.table_rows(tmp_path) == ["unguided", "<b>SAG</b>"]
    found = opening.open_folder(tmp_path, 1)
    assert found.ckpt == "digits" and found.steps == 7 and found.sampler == "ddim"
    # Results of earlier versions do not tell the sampler's options.
    assert found.seed == 2 and found.options == {}
    assert found.guidance is not None and found.guidance["sag"]["scale"] == 0.4
    assert "8.25" in found.page and "<b>SAG" not in found.page
    (tmp_path / "results.json").write_text('{"results": 3}')
    with pytest.raises(ValueError, match="expected the results"):
        opening.open_folder(tmp_path)


def asked_of(path: str, host: str = "127.0.0.1:7860", stored: Sequence[Path] = ()) -> int:
    """The status with which the closed server answers; what it hands on is answered with 200.

    ``stored`` is where Gradio says that it has put an upload.
    """
    statuses: list[int] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        listed = json.dumps([str(each) for each in stored]).encode()
        await send({"type": "http.response.body", "body": listed[:7], "more_body": True})
        await send({"type": "http.response.body", "body": listed[7:]})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(Gate(inner, "127.0.0.1")(scope, receive, send))
    return statuses[0]


def test_the_server_answers_its_page_alone() -> None:
    assert asked_of("/") == asked_of("/gradio_api/queue/join") == asked_of("/theme.css") == 200
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://a.b/", "/monitoring",
                 "/gradio_api/file/etc/passwd", "/gradio_api/vibe-edit/", "/docs"):  # fmt: skip
        assert asked_of(path) == 404
    assert asked_of("/", host="evil.example") == 403


def test_uploads_that_are_no_checkpoints_are_deleted(tmp_path: Path) -> None:
    good, page, bare = tmp_path / "model.SafeTensors", tmp_path / "page.html", tmp_path / "pt"
    for each in (good, page, bare):
        each.touch()
    assert asked_of("/gradio_api/upload", stored=[good]) == 200
    # Each file is looked at, wherever it stands in the upload.
    assert asked_of("/gradio_api/upload", stored=[good, page, bare]) == 415
    assert good.exists() and not page.exists() and not bare.exists()
    assert asked_of("/gradio_api/upload", stored=[]) == 415


def test_uploads_go_by_the_names_that_they_came_with(tmp_path: Path) -> None:
    library = Library(uploads=tmp_path)
    told = library.told(f"{tmp_path}/0a1b/mine.pt: damaged")
    assert told == "mine.pt: damaged" and library.told("/other/x/a.pt") == "/other/x/a.pt"


def test_the_command_is_listed_and_its_addresses_are_bounded() -> None:
    assert "studio" in COMMANDS
    done = subprocess.run(
        [sys.executable, "-m", "sag_dit", "studio", "port=99999"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: port=99999: expected")


@pytest.fixture(scope="module")
def without_gradio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose ``sitecustomize`` hides gradio."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'gradio' else find(name, *more)\n"
    )
    yield folder


def test_without_gradio_one_sentence_says_how_to_get_it(without_gradio: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sag_dit", "studio"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{without_gradio}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'error: the studio needs gradio, which is not installed: pip install -e ".[studio]"'
    )


OF_TEXT = """
import sys
from functools import partial
from pathlib import Path
from sag_dit import api
from sag_dit.studio.app import Begin, Page, Session
from sag_dit.studio.library import Library

folder = Path(sys.argv[1])
api.load_text = partial(api.load_text, size=(16, 16))
ckpt = str(folder / "tiny")
page = Page(Library([folder]), Begin(ckpt, "a corgi", steps=2, images=1))
session = Session()
chosen = page.choose(session, ckpt)
assert page.choose(session, ckpt).keys() == {page.problem}
assert chosen[page.prompt]["visible"] and not chosen[page.label]["visible"]
values = {each: each.value for each in page.inputs}
for each, update in chosen.items():
    if isinstance(update, dict) and "value" in update:
        values[each] = update["value"]
stages = []
for prompt in ("a corgi", "a tabby"):
    values[page.prompt] = prompt
    seen = [*page.draw(Session(), *(values[each] for each in page.inputs))]
    assert f"prompt={prompt}" in seen[0][page.texts[0]].replace("'", "")
    stages.append(seen[-1][page.stage])
    assert prompt in stages[-1] and 'data-running="false"' in stages[-1]
assert stages[0] != stages[1]
"""
"""In a process of its own, for Gradio leaves its loops open when it makes a page."""


def test_a_text_pipeline_is_asked_with_its_prompt(tmp_path: Path) -> None:
    tiny.sd3(medium=False).save_pretrained(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", OF_TEXT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
