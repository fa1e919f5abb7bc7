"""Folders that diffusers wrote, read with the reference's arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sag_dit.checkpoints import load
from sag_dit.checkpoints.files import weights_name
from sag_dit.codec import VAECodec
from sag_dit.models import DiT
from sag_dit.models.dit.layouts import renamed_from_diffusers
from sag_dit.process import DDPM
from tests.checkpoints.conftest import NAMES, Same, edit_json, to_diffusers
from tests.closeness import assert_near
from tests.conftest import MakeDiT

WEIGHTS = "diffusion_pytorch_model"


def test_pipeline_is_the_original_to_the_bit(
    pipeline: Path, tiny_dit: DiT, vae_folder: Path, same: Same
) -> None:
    model = load(pipeline)
    assert same(model.denoiser.network, tiny_dit)
    assert model.name == "small-pipeline"
    assert model.class_names == tuple(NAMES)
    assert model.denoiser.process == DDPM("linear", 1000)
    assert model.denoiser.x_0_range is None
    assert isinstance(model.codec, VAECodec) and model.codec.factor == 2
    assert model.codec.settings["scaling_factor"] == 0.5
    assert model.vae == model.description["vae"] == str(pipeline / "vae")
    assert model.codec.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_diffusers_computes_the_same_once_its_two_constants_are_the_published_ones(
    pipeline: Path,
) -> None:
    """The folder's own class is the judge of the key map, apart from our test's conversion."""
    from diffusers.models import DiTTransformer2DModel

    theirs: Any = DiTTransformer2DModel.from_pretrained(
        pipeline / "transformer", low_cpu_mem_usage=False
    )
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=random)
    t, y = torch.tensor([1, 400, 999]), torch.tensor([2, 10, 7])
    with torch.no_grad():
        expected = theirs.eval()(x, timestep=t, class_labels=y).sample
        assert_near(load(pipeline).denoiser.network(x, t, y), expected)


def test_original_file_and_its_conversion_agree(
    pipeline: Path, tiny_dit: DiT, vae_folder: Path, tmp_path: Path, same: Same
) -> None:
    torch.save(tiny_dit.state_dict(), tmp_path / "original.pt")
    original = load(tmp_path / "original.pt", vae=vae_folder, num_heads=4)
    converted = load(pipeline)
    assert same(original.denoiser.network, converted.denoiser.network)
    assert original.config == converted.config


def test_files_of_published_folders(pipeline: Path, tiny_dit: DiT, same: Same) -> None:
    """The old class name, pickled weights, a null autoencoder setting and stray positions."""
    folder = pipeline / "transformer"
    edit_json(folder / "config.json", _class_name="Transformer2DModel")
    state = load_file(folder / f"{WEIGHTS}.safetensors")
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save({**state, "pos_embed": torch.zeros(1, 16, 48)}, folder / f"{WEIGHTS}.bin")
    model = load(pipeline)
    assert same(model.denoiser.network, tiny_dit)
    assert model.sha256 == load(folder).sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_variants(pipeline: Path, dtype: torch.dtype) -> None:
    folder = pipeline / "transformer"
    state = load_file(folder / f"{WEIGHTS}.safetensors")
    half = {name: value.to(dtype) for name, value in state.items()}
    variant = "fp16" if dtype == torch.float16 else "bf16"
    save_file(half, folder / f"{WEIGHTS}.{variant}.safetensors")
    full = load(pipeline).denoiser.network.state_dict()
    (folder / f"{WEIGHTS}.safetensors").unlink()
    loaded = load(pipeline).denoiser.network.state_dict()
    expected = {name: value.to(dtype).float() for name, value in full.items()}
    expected["pos_embed"] = full["pos_embed"]
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_sharded_weights(pipeline: Path, tiny_dit: DiT, same: Same) -> None:
    from diffusers.models import DiTTransformer2DModel

    folder = pipeline / "transformer"
    whole: Any = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    (folder / f"{WEIGHTS}.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    model = load(pipeline)
    assert same(model.denoiser.network, tiny_dit)
    assert len(model.sha256) == 64
    shards[0].unlink()
    with pytest.raises(ValueError, match="no weights, or not all"):
        load(pipeline)


def test_transformer_folder_finds_the_autoencoder_beside_it(
    pipeline: Path, tiny_dit: DiT, same: Same
) -> None:
    model = load(pipeline / "transformer")
    assert same(model.denoiser.network, tiny_dit)
    assert model.vae == str(pipeline / "vae")


def test_one_file_of_a_folder_is_sent_to_the_folder(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="pass the folder that holds its config"):
        load(pipeline / "transformer" / f"{WEIGHTS}.safetensors")


def test_given_autoencoder_comes_before_the_folders_own(pipeline: Path, vae_folder: Path) -> None:
    other = pipeline.parent / "other"
    shutil.copytree(vae_folder, other)
    edit_json(other / "config.json", scaling_factor=0.25, shift_factor=0.1)
    one, two = load(pipeline), load(pipeline, vae=other)
    assert isinstance(two.codec, VAECodec)
    assert two.codec.settings["scaling_factor"] == 0.25
    assert one.sha256 == two.sha256 and one.config != two.config


@pytest.mark.parametrize(
    ("change", "process", "kind"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, DDPM("cosine", 1000), "eps"),
        ({"prediction_type": "v_prediction"}, DDPM("linear", 1000), "v"),
        (
            {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04},
            DDPM("linear", 500),
            "eps",
        ),
    ],
    ids=str,
)
def test_process_is_the_schedulers(
    pipeline: Path, change: dict[str, object], process: DDPM, kind: str
) -> None:
    edit_json(pipeline / "scheduler" / "scheduler_config.json", **change)
    model = load(pipeline)
    assert (model.denoiser.process, model.denoiser.kind) == (process, kind)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_end": 0.012},
        {"prediction_type": "flow"},
        {"trained_betas": [0.1, 0.2]},
        {"rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_other_processes_are_refused(pipeline: Path, change: dict[str, object]) -> None:
    edit_json(pipeline / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: beta_schedule=.*expected"):
        load(pipeline)


def test_pipelines_of_other_models_are_named(pipeline: Path) -> None:
    edit_json(pipeline / "model_index.json", _class_name="UnCLIPPipeline")
    with pytest.raises(ValueError, match="of UnCLIPPipeline; expected DiTPipeline"):
        load(pipeline)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "PixArtTransformer2DModel"])
def test_other_networks_are_named(pipeline: Path, name: str) -> None:
    edit_json(pipeline / "transformer" / "config.json", _class_name=name)
    with pytest.raises(ValueError, match=f"a {name}; expected diffusers' DiTTransformer2DModel"):
        load(pipeline)


def test_variants_of_the_network_are_refused(pipeline: Path) -> None:
    edit_json(pipeline / "transformer" / "config.json", attention_bias=False)
    with pytest.raises(ValueError, match="attention_bias=False, which no DiT has"):
        load(pipeline)


def test_embedders_that_differ_between_blocks_are_refused(pipeline: Path) -> None:
    path = pipeline / "transformer" / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.2.*differs from the first block's"):
        load(pipeline)


def test_no_tensor_is_dropped_or_invented(make_dit: MakeDiT) -> None:
    network = make_dit(depth=2)
    theirs = to_diffusers(network.state_dict(), depth=2)
    back = renamed_from_diffusers({**theirs, "stray.weight": torch.ones(1)}, depth=2)
    assert set(back) == set(network.state_dict()) - {"pos_embed"} | {"stray.weight"}
    del theirs["transformer_blocks.1.attn1.to_k.bias"]
    partial = renamed_from_diffusers(theirs, depth=2)
    assert "blocks.1.attn.qkv.bias" not in partial
    assert "transformer_blocks.1.attn1.to_q.bias" in partial


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["x.bin", "x.safetensors"], "x.safetensors"),
        (["x.fp16.safetensors", "x.bin"], "x.bin"),
        (["x.fp16.bin", "x.fp16.safetensors"], "x.fp16.safetensors"),
        (["x.safetensors.index.json", "x-00001-of-00002.safetensors"], "x.safetensors.index.json"),
        (["x.safetensors.index.fp16.json"], "x.safetensors.index.fp16.json"),
        (["config.json", "model.safetensors"], None),
    ],
)
def test_best_weights_of_a_folder(names: list[str], chosen: str | None) -> None:
    long = [name.replace("x", WEIGHTS, 1) if name.startswith("x") else name for name in names]
    expected = chosen and chosen.replace("x", WEIGHTS, 1)
    assert weights_name(long) == weights_name(reversed(long)) == expected


def test_labels_that_are_missing_are_numbers(pipeline: Path) -> None:
    edit_json(pipeline / "model_index.json", id2label={"3": "three"})
    names = load(pipeline).class_names
    assert names[3] == "three" and names[4] == "4" and len(names) == 10


def test_config_is_plain(pipeline: Path) -> None:
    config = load(pipeline).config
    assert json.loads(json.dumps(config)) == config
    assert config["codec"]["name"] == "AutoencoderKL" and config["weights"] == "ema"


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        (
            "transformer/config.json",
            {"num_layers": 10**9},
            "num_layers=1000000000, and its weights",
        ),
        ("transformer/config.json", {"attention_head_dim": 10**9}, "head_dim=4000000000, and"),
        ("transformer/config.json", {"sample_size": 10**6}, "expected at most 128 tokens along"),
        ("transformer/config.json", {"patch_size": 0}, "patch_size=0: expected a whole number"),
        ("transformer/config.json", {"num_layers": []}, r"num_layers=\[\]: expected a whole"),
        ("model_index.json", {"id2label": [1]}, r"id2label=\[1\]: expected a mapping"),
        ("scheduler/scheduler_config.json", {"beta_end": []}, r"beta_end=\[\]: expected a number"),
    ],
)
def test_values_that_a_folder_cannot_have_cost_nothing(
    pipeline: Path, file: str, values: dict[str, object], told: str
) -> None:
    edit_json(pipeline / file, **values)
    with pytest.raises(ValueError, match=told) as caught:
        load(pipeline)
    assert "\n" not in str(caught.value) and str(pipeline) in str(caught.value)
