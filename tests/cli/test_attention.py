"""``attention.py``, and ``maps=true`` of ``sample.py``: what is kept, drawn and refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sag_dit
from sag_dit.attention import AttentionTap, Capture
from sag_dit.cli import attention, sample
from sag_dit.cli.app import launch
from sag_dit.cli.attention import gate_norms
from sag_dit.data.requests import make_requests
from sag_dit.sampling import Request, Settings, trajectory
from sag_dit.traces import Maps, Recorder
from tests.pipelines import tiny


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    return tmp_path


def test_sheet_of_every_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(
        "attention",
        attention.run_attention,
        ["classes=[3]", "steps=4", "attention.show=2", "attention.query=[0.9,0]", "out=seen"],
    )
    printed = capsys.readouterr().out
    arrays = np.load("seen/000-class-3.npz")
    assert arrays["steps"].tolist() == [0, 3]
    assert arrays["times"][0] == 999
    for i in range(4):
        layer = f"blocks.{i}.attn"
        assert layer in printed
        assert np.allclose(arrays[f"{layer}/saliency"].mean((1, 2)), 1, atol=1e-5)
        assert (arrays[f"{layer}/mask"] == (arrays[f"{layer}/saliency"] > 1)).all()
        assert np.allclose(arrays[f"{layer}/query_map"].sum((1, 2)), 1, atol=1e-5)
    with Image.open("seen/000-class-3.png") as sheet:
        # A row for each layer and one for its query, a column for each step and the image.
        assert sheet.height > 1.8 * sheet.width


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        (["guidance.sag.layer=blocks.2"], ["blocks.2"]),
        (["guidance.sag.layer=[0,blocks.3]"], ["blocks.0", "blocks.3"]),
        (["guidance.sag.layer=blocks.2", "attention.threshold=1.5"], ["blocks.2"]),
        (["guidance.sag.layer=blocks.2", "sag_scale=0"], ["blocks.1"]),
        (["guidance.sag.layer=blocks.2", "attention.layers=[blocks.0]"], ["blocks.0"]),
    ],
)
def test_maps_are_of_the_layer_that_sag_uses(
    here: Path, arguments: list[str], layers: list[str]
) -> None:
    few = ["ckpt=digits", "steps=2", "num_images=1", "batch_size=1", "maps=true", "out=seen"]
    few += ["sag_scale=0.5"]
    launch("sample", sample.run_sample, [*few, *arguments])
    arrays = np.load("seen/attention/000000.npz")
    kept = [name.removesuffix(".attn/saliency") for name in arrays.files if "saliency" in name]
    assert kept == layers


def test_a_random_class_is_drawn_as_sample_draws_it(here: Path) -> None:
    few = ["steps=1", "attention.show=1", "out=seen", "seed=3", "classes=random"]
    launch("attention", attention.run_attention, few)
    (request,) = make_requests(1, 3, "random", [str(digit) for digit in range(10)])
    assert (here / "seen" / f"000-class-{request.label}.png").exists()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_sheet_of_a_text_models_prompt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.sd().save_pretrained(here / "text")
    asked = ["ckpt=text", "prompt=a corgi", "steps=2", "attention.show=1", "out=seen"]
    launch("attention", attention.run_attention, [*asked, "text.size=[16,32]"])
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in capsys.readouterr().out
    arrays = np.load("seen/000-prompt.npz")
    (name,) = (key for key in arrays.files if key.startswith("mid") and key.endswith("saliency"))
    assert arrays[name].shape == (1, 4, 8)  # Half of the latent's sides, which are not the same.
    assert np.isfinite(arrays[name]).all() and arrays[name].std() > 1e-3
    with Image.open("seen/000-prompt.png") as sheet:
        assert sheet.width > 100
    for wrong, named in ((["classes=[0]"], "leave out either"), (["prompt=null"], "pass prompt=")):
        with pytest.raises(SystemExit):
            launch("attention", attention.run_attention, [*asked, *wrong])
        assert named in capsys.readouterr().err


def test_query_map_is_that_tokens_row() -> None:
    model = sag_dit.load("digits")
    maps = Maps(query=(0.9, 0.2), steps=(1,))
    recorder = Recorder(model.denoiser, maps=maps)
    settings = Settings(steps=3, batch_size=1)
    states = []
    with torch.no_grad():
        for step in trajectory(model, [Request(0, 0, 5, 0)], settings, recorder.captures):
            recorder(step)
            states.append(step)
        layer = model.denoiser.layer("auto")
        with AttentionTap(model.denoiser.network, [Capture(layer, kind="map")]) as tap:
            level = states[1].step.level
            model.denoiser.network(states[0].x, level.times(states[0].x), torch.tensor([5]))
    expected = tap.captured[f"{layer.name}:map"][0].mean(0)[7 * 8 + 1]
    maps_kept = recorder.trace(0).maps
    assert maps_kept is not None
    (seen,) = maps_kept.layers
    assert seen.query_map is not None
    assert np.allclose(seen.query_map.flatten(), expected, atol=1e-6)


def test_gate_norm_is_that_of_the_attention_gate() -> None:
    model = sag_dit.load("digits")
    network = model.denoiser.network
    with torch.no_grad():
        linear = network.blocks[2].adaLN_modulation[1]
        linear.weight.zero_()
        linear.bias.zero_()
        width = linear.bias.numel() // 6
        linear.bias[2 * width : 3 * width] = -0.5
        with gate_norms(model.denoiser) as norms:
            network(torch.zeros(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1]))
            network(torch.zeros(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1]))
        network(torch.zeros(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1]))
    assert norms["blocks.2.attn"] == pytest.approx([0.5, 0.5])
    assert len(norms) == 4


def test_maps_of_a_run_are_kept_later_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    asked = ["num_images=3", "steps=3", "out=run", "gallery.num=2", "batch_size=3"]
    # Beside CFG, SAG degrades the null branch, and the maps are the given class's.
    asked += ["cfg_scale=2", "guidance.sag.quantile=0.8", "guidance.sag.interval=[0.3,1]"]
    launch("sample", sample.run_sample, [*asked, "trainer.accelerator=cpu"])
    assert not Path("run/attention").exists()
    files = [Path("run/images/000000.png"), Path("run/maps/000000.npz")]
    before = [file.read_bytes() for file in files]
    launch("sample", sample.run_sample, [*asked, "trainer.accelerator=cpu", "maps=true"])
    assert "attention: run/attention" in capsys.readouterr().out
    kept = sorted(file.name for file in Path("run/attention").iterdir())
    assert kept == ["000000.npz", "000000.png", "000001.npz", "000001.png"]
    assert [file.read_bytes() for file in files] == before
    seen, maps = np.load(files[1]), np.load("run/attention/000000.npz")
    assert (seen["index"].tolist(), maps["steps"].tolist()) == ([1, 2], [0, 1, 2])
    (name,) = (key.removesuffix("/mask") for key in maps.files if key.endswith("/mask"))
    saliency, mask = maps[f"{name}/saliency"], maps[f"{name}/mask"]
    assert np.abs(saliency[1:] - seen["saliency"]).max() > 1e-2
    # As SAG masks its own: the fifth of the tokens that receives most.
    limits = np.quantile(saliency, 0.8, axis=(1, 2), keepdims=True)
    assert (mask == (saliency > limits)).all()


def test_maps_without_a_gallery_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit):
        launch("sample", sample.run_sample, ["maps=true", "gallery.num=0", "ckpt=no-such-file"])
    assert "set gallery.num to how many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("attention.layers=[blocks.9]", "blocks.9"),
        ("attention.layers=blocks.1", "expected a list"),
        ("attention.layers=[]", "expected a list of layers"),
        ("attention.show=[]", "expected how many steps"),
        ("attention.show=[4]", "step 4 does not exist: expected 0 to 3"),
        ("attention.show=0", "1 or more"),
        ("attention.show=all", "expected how many"),
        ("attention.query=3", "expected [down, across]"),
        ("attention.query=[1,0]", "less than 1"),
        ("classes=[12]", "class 12 does not exist"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], asked: str, named: str) -> None:
    with pytest.raises(SystemExit):
        launch("attention", attention.run_attention, ["steps=4", asked])
    assert named in capsys.readouterr().err
    assert not Path("outputs").exists()
