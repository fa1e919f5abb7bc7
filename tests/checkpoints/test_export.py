"""Exports load where they are meant for, with the same weights, and replace nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sag_dit.checkpoints import Model, from_denoiser, load
from sag_dit.checkpoints import export as export_module
from sag_dit.checkpoints.export import export
from sag_dit.codec import VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM, Flow
from tests.checkpoints.conftest import NAMES, Same, edit_json
from tests.checkpoints.conftest import to_diffusers as theirs_of
from tests.closeness import assert_near
from tests.conftest import MakeDiT

LAYOUTS = ("dit", "diffusers", "safetensors")
MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(make_dit: MakeDiT, vae_folder: Path) -> MakeModel:
    """A latent model in memory; ``process`` and ``kind`` may be given, the rest is DiT's."""

    def make(process: Any = None, kind: Any = "eps", vae: Path = vae_folder, **dit: Any) -> Model:
        network = make_dit(**dit)
        names = NAMES if network.num_classes == len(NAMES) else ()
        denoiser = ClassConditional(network, process or DDPM(), kind, class_names=names)
        return from_denoiser(denoiser, "small", codec=VAECodec(vae), vae=str(vae))

    return make


@pytest.fixture
def pixels(pixel_dit: DiT) -> Model:
    """A pixel model."""
    return from_denoiser(ClassConditional(pixel_dit, DDPM(), x_0_range=(-1, 1)), "pixels")


def identical(one: Model, other: Model) -> bool:
    """Whether all weights are, to the bit."""
    states = [model.denoiser.network.state_dict() for model in (one, other)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("process", "kind", "dit"),
    [
        (DDPM(), "eps", {}),
        (DDPM("cosine", 500), "v", {"learn_sigma": False, "hidden_size": 96, "num_heads": 6}),
        (DDPM("linear", 250), "x_0", {"num_classes": 1000, "patch_size": 4}),
    ],
    ids=["published", "cosine-v", "x_0"],
)
def test_round_trip(
    make_model: MakeModel, tmp_path: Path, layout: str, process: DDPM, kind: str, dit: Any
) -> None:
    model = make_model(process, kind, **dit)
    done = export(model, tmp_path / "deep" / "out", layout)
    loaded = load(done.path)
    assert identical(model, loaded)
    assert loaded.denoiser.class_names == model.denoiser.class_names
    ours, theirs = model.description, loaded.description
    assert {**theirs, "vae": ours["vae"]} == ours
    assert loaded.vae is not None and len(loaded.sha256) == 64
    x_0 = torch.zeros(1, 4, 8, 8)
    assert torch.equal(loaded.codec.decode(x_0), model.codec.decode(x_0))


@pytest.mark.parametrize("layout", ["dit", "safetensors"])
def test_round_trip_of_what_diffusers_lacks(
    make_model: MakeModel, pixels: Model, tmp_path: Path, layout: str
) -> None:
    flow = make_model(Flow(), "v", class_dropout_prob=0.0, num_classes=1, mlp_ratio=2.5)
    for name, model in (("flow", flow), ("pixels", pixels)):
        loaded = load(export(model, tmp_path / name, layout).path)
        assert identical(model, loaded)
        assert loaded.description == model.description


def test_official_file_is_flat_and_has_the_official_keys(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The keys are written out, so that renaming a module of ours is noticed."""
    state = torch.load(export(make_model(depth=2), tmp_path / "out", "dit").path, weights_only=True)
    parts = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    parts += ["final_layer.adaLN_modulation.1"]
    for i in range(2):
        inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        parts += [f"blocks.{i}.{part}" for part in inner]
    names = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(state) == names | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")  # diffusers' own, about what it imports
def test_diffusers_loads_and_draws(make_model: MakeModel, tmp_path: Path, same: Same) -> None:
    """With the published constant in place of its own, its network gives our outputs."""
    from diffusers import DiTPipeline

    model = make_model()
    folder = export(model, tmp_path / "out", "diffusers").path
    assert not any(str(tmp_path.parent).encode() in held for held in tree(folder).values())
    pipeline = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    # Its own commas split a name, as in ImageNet's.
    assert pipeline.labels["class 3"] == pipeline.labels["kind 3"] == 3
    assert pipeline.vae.config.scaling_factor == 0.5
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2], guidance_scale=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    network = pipeline.transformer.eval()
    expected = theirs_of(model.denoiser.network.state_dict(), depth=3)
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in expected.items())
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 400, 999])
    y = torch.tensor([2, 10, 7])
    with torch.no_grad():
        ours, differs = model.denoiser.network(x, t, y), network(x, timestep=t, class_labels=y)
        assert (differs.sample - ours).abs().max() > 1e-3
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        fixed = network(x, timestep=t, class_labels=y).sample
    assert_near(fixed, ours)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_scheduler_reads_the_output_as_our_process_does(
    make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    """One DDIM step of the exported scheduler, from t = 500, against our own x_0."""
    from diffusers.schedulers import DDIMScheduler

    model = make_model(DDPM("cosine"), kind, learn_sigma=False)
    folder = export(model, tmp_path / "out", "diffusers").path
    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(2)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = model.denoiser.process.level(500)
    ours = model.denoiser.process.predict(x, level, output, kind).x_0
    theirs = scheduler.step(output, 500, x).pred_original_sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_what_a_program_cannot_express_is_named(
    make_model: MakeModel, pixels: Model, vae_folder: Path, tmp_path: Path
) -> None:
    shifting = tmp_path / "shifting"
    shutil.copytree(vae_folder, shifting)
    edit_json(shifting / "config.json", shift_factor=0.1)
    moved = make_model()
    moved.denoiser.network.pos_embed.data.add_(0.1)
    bounded = make_model()
    bounded.denoiser.x_0_range = (-2.0, 2.0)
    both = make_model(mlp_ratio=3.0)
    both.denoiser.network.pos_embed.data.add_(0.1)
    cases = {
        "an MLP 3 times.*; positions of its own": both,
        "a pixel model": pixels,
        r"a rectangular input \(8 x 16\)": make_model(input_size=(8, 16)),
        "no null class": make_model(class_dropout_prob=0.0),
        "1001 classes": make_model(num_classes=1001),
        "the process Flow": make_model(Flow(), "v"),
        "an MLP 3 times as wide": make_model(mlp_ratio=3.0),
        "positions of its own": moved,
        r"latents bounded to \(-2\.0": bounded,
        "an autoencoder with shift_factor": make_model(vae=shifting),
    }
    for reason, model in cases.items():
        with pytest.raises(ValueError, match=rf"DiTPipeline cannot .*{reason}.*=safetensors"):
            export(model, tmp_path / "out", "diffusers")
    with pytest.raises(ValueError, match=r"facebookresearch/DiT cannot .*input \(8 x 16\)"):
        export(make_model(input_size=(8, 16)), tmp_path / "out", "dit")
    assert not (tmp_path / "out").exists()


def test_rectangles_are_not_for_the_official_code(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"facebookresearch/DiT cannot .*rectangular input \(8 x 16"
    ):
        export(make_model(input_size=(8, 16)), tmp_path / "out", "dit")


def test_notes_say_what_differs(make_model: MakeModel, pixels: Model, tmp_path: Path) -> None:
    assert export(make_model(), tmp_path / "a", "dit").notes == ()
    (note,) = export(pixels, tmp_path / "b", "dit").notes
    assert "sampling scripts do not fit" in note and "it works on pixels" in note
    first, second = export(make_model(), tmp_path / "c", "diffusers").notes
    assert "127" in first and "guidance_scale=1" in second
    assert len(export(make_model(num_classes=1000), tmp_path / "d", "diffusers").notes) == 1
    card = (tmp_path / "c" / "README.md").read_text()
    assert first in card and second in card


@pytest.mark.parametrize("layout", LAYOUTS)
def test_card_tells_source_config_and_data(
    training: Path, pipeline: Path, tmp_path: Path, layout: str
) -> None:
    ema = layout == "diffusers"
    model = load(pipeline) if ema else load(training, ema=False)
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors" if ema else training
    export(model, tmp_path / "out", layout, data="Photos of corgis.", ema=ema)
    card = (tmp_path / "out" / "README.md").read_text()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert "Photos of corgis." in card
    assert ("raw, not averaged" in card, "averaged (EMA)" in card) == (not ema, ema)
    config = json.loads(card.split("```json\n")[1].split("```")[0])
    assert config["model"] == model.description["model"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_again_changes_nothing(make_model: MakeModel, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    assert export(make_model(), out, layout).fresh
    before = tree(tmp_path)
    assert not export(make_model(), out, layout).fresh
    assert tree(tmp_path) == before


def test_other_content_is_kept(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(make_model(), out, "dit")
    before = tree(tmp_path)
    for model, layout in ((make_model(seed=1), "dit"), (make_model(), "safetensors")):
        with pytest.raises(ValueError, match="not empty and not this export"):
            export(model, out, layout)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"it holds mine\.txt"):
        export(make_model(), out, "dit")
    (out / "mine.txt").unlink()
    assert tree(tmp_path) == before
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"its config\.json is missing or differs"):
        export(make_model(), out, "dit")


def test_impossible_folders_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_text("x")
    before = tree(tmp_path)
    for out, reason in (
        ("file", "a file; expected a folder"),
        ("full", "it holds other files"),
        ("dit.pt", "expected a folder; the weights"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(model, tmp_path / out, "dit")
    with pytest.raises(ValueError, match="format=onnx: expected dit, diffusers, safetensors"):
        export(model, tmp_path / "new", "onnx")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failure_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export_module, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export(make_model(), tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told_before_anything_is_written(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"0\.0 MB are free and .* needed; make room"):
        export(make_model(), tmp_path / "out", "dit")
    assert list(tmp_path.iterdir()) == []


def test_class_names_are_no_markup_in_the_card(pixel_dit: DiT, tmp_path: Path) -> None:
    names = ["<script>x</script>", "![i](http://a)", "a|b`c`", *map(str, range(3, 10))]
    denoiser = ClassConditional(pixel_dit, DDPM(), class_names=names)
    export(from_denoiser(denoiser, "small"), tmp_path / "out", "safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "&lt;script&gt;x&lt;/script&gt;" in card and "<script" not in card
    assert r"!\[i\](http://a)" in card and r"a\|b\`c\`" in card
