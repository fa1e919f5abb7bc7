"""The package from Python: what `sag_dit.load` returns draws, moves and shows itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sag_dit
from sag_dit import CFG, SAG
from sag_dit.checkpoints import from_denoiser
from sag_dit.cli import sample
from sag_dit.cli.composing import make
from sag_dit.guidance import Term
from sag_dit.process import DDPM, Flow
from sag_dit.sampler import Sampler, named
from sag_dit.traces import Maps


@pytest.fixture(scope="module")
def model() -> sag_dit.LoadedModel:
    return sag_dit.load("digits")


def test_images_are_those_of_the_function(model: sag_dit.LoadedModel) -> None:
    guidance = [SAG(1.0), CFG(1.5)]
    out = model.sample([3, "7", 1], guidance=guidance, steps=4, seed=5)
    same = sag_dit.sample(model, [3, 7, 1], guidance=guidance, steps=4, seed=5)
    assert torch.equal(out.tensor, same)
    assert out.labels == ("3", "7", "1")
    assert [np.asarray(image).tolist() for image in out.images] == same[:, 0].tolist()
    assert (out.twins, out.maps) == ([], [])


def test_one_class_and_one_term_need_no_brackets(model: sag_dit.LoadedModel) -> None:
    one = model.sample("7", guidance=SAG(1.0), steps=3)
    listed = model.sample([7], guidance=[SAG(1.0)], steps=3)
    assert torch.equal(one.tensor, listed.tensor)


def test_twins_are_the_unguided_images(model: sag_dit.LoadedModel) -> None:
    out = model.sample([3, 7], guidance=SAG(2.0), steps=4, batch_size=1, twins=True)
    assert torch.equal(out.twins_tensor, model.sample([3, 7], steps=4, batch_size=1).tensor)
    assert not torch.equal(out.twins_tensor, out.tensor)
    assert len(out.twins) == 2
    assert "with twins" in repr(out)


def test_maps_show_the_layer_that_sag_reads(model: sag_dit.LoadedModel) -> None:
    out = model.sample(3, guidance=SAG(1.0, layer="blocks.2", threshold=1.3), steps=4, maps=True)
    (view,) = out.maps
    assert [layer.name for layer in view.layers] == ["blocks.2.attn"]
    assert (view.layers[0].mask == (view.layers[0].saliency > 1.3)).all()
    assert "name='blocks.2.attn'" in repr(out.maps) and len(repr(out.maps)) < 300
    every = model.sample(3, steps=4, maps=Maps(layers=("all",), steps=2)).maps[0]
    assert len(every.layers) == len(model.denoiser.layers)
    assert every.steps == (0, 3)


@pytest.mark.parametrize(("sampler", "count"), [("ddim", 8), ("kdpm2", 15)])
def test_steps_are_counted_in_one_way_and_maps_cover_them(
    model: sag_dit.LoadedModel, sampler: str, count: int
) -> None:
    """Of a sampler that asks the network twice in a step too."""
    ask: dict[str, Any] = {"guidance": SAG(1.0), "sampler": sampler, "steps": 8, "twins": True}
    out = model.sample([3, 7], maps=Maps(steps=3), **ask)
    *_, last = model.watch([3, 7], maps=Maps(steps=3), **ask)
    for each in (out, last):
        assert (each.step, each.steps) == (count, count)
        assert [view.steps for view in each.maps] == [(0, round((count - 1) / 2), count - 1)] * 2
        assert all(len(layer.saliency) == 3 for view in each.maps for layer in view.layers)
        seen = each.traces[0].steps
        assert (seen[0].index, seen[-1].index, seen[0].count) == (0, count - 1, count)
    assert model.sample(3, maps=Maps(steps=(count - 1,)), **ask).maps[0].steps == (count - 1,)
    with pytest.raises(ValueError, match=f"step {count} does not exist: expected 0 to {count - 1}"):
        model.sample(3, maps=Maps(steps=(count,)), **ask)


@pytest.mark.parametrize("file", sorted(Path("configs/sampler").glob("*.yaml")), ids=str)
def test_samplers_have_the_names_of_the_command_line(file: Path) -> None:
    flow = "flow" in file.stem
    own = named(file.stem, Flow() if flow else DDPM())
    stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(own, Sampler)
    if file.stem != "auto":
        assert own.identity() == make(stated, "sampler", Sampler).identity()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "kdpm2"])
def test_what_is_watched_ends_as_what_is_drawn(model: sag_dit.LoadedModel, sampler: str) -> None:
    ask: dict[str, Any] = {"guidance": SAG(1.0), "sampler": sampler, "steps": 8, "twins": True}
    seen = list(model.watch([3, 7], every=3, **ask))
    out = model.sample([3, 7], **ask)
    assert torch.equal(seen[-1].tensor, out.tensor)
    assert torch.equal(seen[-1].twins_tensor, out.twins_tensor)
    assert [part.step for part in seen[:-1]] == list(range(3, seen[-1].step, 3))
    assert "step 3 of" in repr(seen[0])
    assert torch.is_grad_enabled()


def test_a_watch_is_stopped_within_a_step(model: sag_dit.LoadedModel) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 5

    assert [out.step for out in model.watch(3, steps=9, every=3, stop=stop)] == [3]
    assert len(asked) == 5


def test_a_watch_that_is_closed_draws_no_more(
    model: sag_dit.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = model.denoiser.network.forward
    monkeypatch.setattr(
        model.denoiser.network, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    watching = model.watch(3, every=1, steps=20)
    next(watching)
    watching.close()
    assert len(calls) == 1


def test_a_gallery_is_written_and_shown(model: sag_dit.LoadedModel, tmp_path: Path) -> None:
    out = model.sample([3, 7], guidance=SAG(1.0), steps=4, twins=True)
    page = out.gallery(tmp_path / "shown")
    assert page.parent == tmp_path / "shown"
    assert (tmp_path / "shown" / "grid.png").exists()
    assert out._repr_html_().startswith("<iframe srcdoc=")
    alone = model.sample([3, 7], steps=4)
    (first, _) = re.findall(r'base64,([^"]+)"', alone._repr_html_())
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert shown.tolist() == alone.tensor[0, 0].tolist()
    with pytest.raises(ValueError, match="twins=True"):
        alone.gallery(tmp_path)
    (tmp_path / "page").touch()
    with pytest.raises(ValueError, match="page' is a file; expected a folder"):
        out.gallery(tmp_path / "page")


def test_a_notebook_shows_the_first_images_and_says_so(model: sag_dit.LoadedModel) -> None:
    for twins in (False, True):
        out = model.sample(range(10), steps=1, twins=twins)
        assert "The first" not in out._repr_html_()
        shown = model.sample([*range(10)] * 2, steps=1, twins=twins)._repr_html_()
        count = shown.count("&quot;index&quot;") if twins else shown.count("<img")
        assert count == 16 and shown.startswith("<p>The first 16 of 20; ")


def told(page: Path) -> dict[str, Any]:
    """What a gallery holds for its scripts."""
    text = page.read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return data


@pytest.mark.parametrize("guidance", [(), (SAG(1.0),), (CFG(1.5), SAG(1.0))], ids=len)
def test_a_gallery_is_that_of_the_command(
    model: sag_dit.LoadedModel, guidance: tuple[Term, ...], tmp_path: Path
) -> None:
    """All that both pages say and show, drawn by either."""
    out = model.sample([3, "7"], guidance=guidance, steps=4, seed=5, batch_size=2, twins=True)
    data = told(out.gallery(tmp_path / "python"))
    arguments = shlex.split(data["command"])[2:]
    here = [f"out={tmp_path / 'command'}", "trainer.accelerator=cpu", "trainer.devices=1"]
    sample.main([*arguments, *here])
    other = told(tmp_path / "command" / "index.html")
    for key in ("words", "spared", "command", "python", "entries"):
        assert data[key] == other[key], key
    leads = [
        (tmp_path / name / "index.html").read_text("utf-8").partition('id="lead"')[2][:300]
        for name in ("python", "command")
    ]
    assert leads[0] == leads[1] and ("moved each image" in leads[0]) == bool(guidance)
    assert [*data["entries"][0]["images"]][1:-1] == ["spared"] * (len(guidance) > 1)
    # What is to be copied draws the images again.
    names: dict[str, Any] = {}
    exec(data["python"], names)
    assert torch.equal(names["out"].tensor, out.tensor)


def test_python_to_copy_tells_how_a_model_was_loaded_and_where_it_is() -> None:
    model = sag_dit.load("digits", dtype=torch.bfloat16)
    out = model.sample(["3"] * 3, guidance=SAG(0.5), steps=3, batch_size=2)
    assert 'sag_dit.load("digits", dtype=torch.bfloat16)' in out.about.python
    assert out.about.command.startswith("# dtype=torch.bfloat16: ")
    names: dict[str, Any] = {}
    exec(out.about.python, names)
    assert torch.equal(names["out"].tensor, out.tensor)
    memory = sag_dit.LoadedModel.of(from_denoiser(model.class_conditional, "mine"))
    assert "made in memory" in memory.sample(3, steps=2).about.python


def test_a_watched_gallery_has_unguided_twins_alone(
    model: sag_dit.LoadedModel, tmp_path: Path
) -> None:
    *_, out = model.watch([3], guidance=[SAG(1.0), CFG(1.5)], steps=4, twins=True)
    data = told(out.gallery(tmp_path))
    assert data["spared"] == "" and [*data["entries"][0]["images"]] == ["unguided", "guided"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"classes": None}, "classes=None: expected a class"),
        ({"classes": [None]}, "class None does not exist"),
        ({"classes": {3}}, "classes=.3.: expected"),
        ({"classes": "x"}, "class 'x' does not exist"),
        ({"classes": []}, "classes=.*expected"),
        ({"guidance": 0.5}, "guidance=0.5: expected a term"),
        ({"guidance": ["sag"]}, "expected a term or a list"),
        ({"sampler": "foo"}, "sampler 'foo' is unknown.*ddim"),
        ({"sampler": 5}, "sampler=5: expected a name"),
        ({"steps": "20"}, "steps='20': expected a whole number"),
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"classes": np.array([3, 10])}, "class 10 does not exist"),
        ({"classes": np.array(["x"])}, "class 'x' does not exist"),
        ({"guidance": [SAG(0.5), None]}, "guidance=a list: expected a term"),
        ({"guidance": SAG}, "guidance=<class .*SAG.>: expected a term"),
        ({"sampler": diffusers.DDIMScheduler()}, "sampler=a DDIMScheduler: expected a name"),
        ({"steps": 2.0}, "steps=2.0: expected a whole number"),
        ({"seed": torch.Generator()}, "seed=.*Generator.*: expected a whole number"),
        ({"twins": "no"}, "twins='no': expected True or False"),
        ({"progress": 1}, "progress=1: expected True or False"),
        ({"share_prefixes": 1}, "share_prefixes=1: expected True or False"),
        ({"cache": 2}, r"cache=2: expected how, as in cache=Cache\(every=2"),
        ({"cache": sag_dit.Cache(2), "share_prefixes": True}, "cache.every=2 beside share_pref"),
        ({"maps": "all"}, "maps='all': expected True, False, or which"),
    ],
)
def test_wrong_values_end_in_a_sentence(
    model: sag_dit.LoadedModel, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.sample(**{"classes": 3, "steps": 2, **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"classes": "x"}, "class 'x' does not exist"),
        ({"classes": [1, 2, 3], "batch_size": 2}, "3 classes .* at most batch_size=2"),
        ({"every": 0}, "every=0: expected 1 or more"),
        ({"every": 1.5}, "every=1.5: expected a whole number"),
        ({"maps": 3}, "maps=3: expected"),
    ],
)
def test_a_watch_refuses_before_it_is_looked_at(
    model: sag_dit.LoadedModel, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.watch(**{"classes": 3, "steps": 2, **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_inference_steps": 30}, r"num_inference_steps=30 is no .*: write steps=30$"),
        ({"guidance_scale": 4.0}, r": write guidance=CFG\(4.0\)$"),
        ({"sag_scale": 0.5}, r"sag_scale=0.5 is no .*: write guidance=SAG\(0.5\)$"),
        ({"generator": torch.Generator()}, "generator=.* write seed=0$"),
        ({"class_labels": [207]}, r": write classes=\[207\]$"),
        ({"prompt": "a fox"}, r": write model.prompted\('a fox'\).sample\(0\)$"),
        ({"sead": 3}, "expected .*; did you mean seed[?]$"),
    ],
)
def test_words_of_others_are_answered_with_ours(
    model: sag_dit.LoadedModel, values: dict[str, Any], said: str
) -> None:
    def own(*arguments: Any, **options: Any) -> Any:
        return sag_dit.sample(model, *arguments, **options)

    for function in (model.sample, model.watch, own):
        with pytest.raises(ValueError, match=said):
            function(3, **values)
    with pytest.raises(ValueError, match=r"torch_dtype=.*: write dtype=torch.float16$"):
        sag_dit.load("digits", **{"torch_dtype": torch.float16})
    # An argument that is missing stays what it is in Python.
    with pytest.raises(TypeError, match="missing"):
        model.sample(**{"steps": 3})


@pytest.mark.parametrize(
    "classes", [np.array([3, 7]), [np.int64(3), "7"], torch.tensor([3, 7]), np.array(["3", "7"])]
)
def test_numbers_of_arrays_are_numbers(model: sag_dit.LoadedModel, classes: Any) -> None:
    out = model.sample(classes, steps=np.int64(2), seed=np.uint32(1), guidance=SAG(0.5))
    assert torch.equal(out.tensor, model.sample([3, 7], steps=2, seed=1, guidance=SAG(0.5)).tensor)
    names: dict[str, Any] = {}
    exec(out.about.python, names)
    assert torch.equal(names["out"].tensor, out.tensor)
    if not isinstance(classes, torch.Tensor):
        assert len(sag_dit.sample(model, classes, steps=1)) == 2


@pytest.mark.parametrize("ckpt", [None, 3, ["digits"]])
def test_a_checkpoint_is_a_name_or_a_path(ckpt: Any) -> None:
    with pytest.raises(ValueError, match=r"ckpt=.*: expected a name, or a path"):
        sag_dit.load(ckpt)
    with pytest.raises(ValueError, match=r"ckpt=.*: expected a name, or a path"):
        sag_dit.load_text(ckpt, "a fox")


def test_a_model_moves_and_tells_of_itself() -> None:
    model = sag_dit.load("digits", dtype=torch.bfloat16)
    assert (model.device.type, model.dtype) == ("cpu", torch.bfloat16)
    assert "10 classes" in repr(model)
    assert "bfloat16" in repr(model)
    half = model.sample([3, 7], guidance=SAG(0.5), steps=4).tensor.float()
    assert model.to("cpu", torch.float32) is model
    full = model.sample([3, 7], guidance=SAG(0.5), steps=4).tensor.float()
    assert 0 < (half - full).abs().mean() < 0.1 * full.std()
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device": "nonsense"}, "device='nonsense' cannot be used here"),
        ({"device": "cuda:77"}, "device='cuda:77' cannot be used here"),
        ({"dtype": torch.int8}, "dtype=torch.int8: expected"),
        ({"dtype": "float16"}, "dtype=float16: expected"),
        ({"device": "float16"}, "device='float16' is no device: write dtype=torch.float16"),
        ({"device": "bf16"}, "device='bf16' is no device: write dtype=torch.bfloat16"),
    ],
)
def test_places_that_cannot_be_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sag_dit.load("digits", **values)


def test_shared_prefixes_give_the_same_images_and_tell_where_they_cannot(
    model: sag_dit.LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    term, blocks = sag_dit.PAG(0.7, layers=-1), model.denoiser.network.blocks
    rows: list[int] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    apart = model.sample([3, 7], guidance=term, steps=4)
    shared = model.sample([3, 7], guidance=term, steps=4, share_prefixes=True)
    frames = [*model.watch([3, 7], guidance=term, steps=4, share_prefixes=True)]
    plain = sag_dit.sample(model, [3, 7], guidance=[term], steps=4, share_prefixes=True)
    handle.remove()
    assert {*rows[:4]} == {2 * model.batch_size} and {*rows[4:]} == {model.batch_size}
    assert (shared.tensor.int() - apart.tensor.int()).abs().max() <= 1
    assert torch.equal(frames[-1].tensor, shared.tensor) and torch.equal(plain, shared.tensor)
    assert not caplog.messages
    model.sample(3, guidance=sag_dit.SAG(0.5), steps=2, share_prefixes=True)
    (told,) = caplog.messages
    assert told.startswith("share_prefixes=true saves nothing here: no method that is on")


def test_a_cache_computes_blocks_at_some_steps(
    model: sag_dit.LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"steps": 4, "cache": sag_dit.Cache(2, order=1)}
    runs: list[int] = []
    attention = model.denoiser.network.blocks[0].attn
    handle = attention.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    out = model.sample([3, 7], guidance=sag_dit.CFG(1.5), **asked)
    handle.remove()
    # Steps 0, 1 and 3, two rows an image.
    assert runs == [2 * model.batch_size] * 3
    frames = [*model.watch([3, 7], guidance=sag_dit.CFG(1.5), **asked)]
    plain = sag_dit.sample(model, [3, 7], guidance=[sag_dit.CFG(1.5)], **asked)
    assert torch.equal(frames[-1].tensor, out.tensor) and torch.equal(plain, out.tensor)
    assert "cache=Cache(every=2, order=1)" in out.about.python
    assert not caplog.messages
    model.sample(3, guidance=sag_dit.TPG(0.5), **asked)
    (told,) = caplog.messages
    assert told.startswith("cache.every=2 saves nothing here: tpg asks at every step")
