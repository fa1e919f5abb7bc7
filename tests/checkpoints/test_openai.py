"""Files of guided and improved diffusion: told apart by their weights, loaded, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit import catalogue
from sag_dit.checkpoints import build, describe, load, load_classifier, write_safetensors, zoo
from sag_dit.models import families
from sag_dit.models.unet import adapter
from sag_dit.models.unet.adapter import Sizes, Variant, convert, sizes_of
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from tests.checkpoints.openai import state_of

SMALL = Sizes(3, 32, 1, (1, 2), (1,), True, True, 0, True)
OWN = {"model": {"input_size": 16, "num_head_channels": 32}}

KINDS: tuple[catalogue.Kind, ...] = ("model", "classifier", "upsampler")


def small(**changed: Any) -> dict[str, Tensor]:
    """Weights of a small network of the published layout."""
    torch.manual_seed(0)
    sizes = Sizes(**{**vars(SMALL), **changed})
    state = state_of(Variant("", sizes, 16, {}), device="cpu")
    return {name: 0.1 * torch.randn(tensor.shape) for name, tensor in state.items()}


def saved(path: Path, state: dict[str, Tensor], beside: dict[str, Any] | None = None) -> Path:
    """Write a file as openai did, and perhaps a config beside it."""
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))
    return path


@pytest.mark.parametrize("variant", adapter.variants(), ids=lambda variant: variant.file)
def test_published_files_are_told_apart_by_their_weights(variant: Variant) -> None:
    sizes = sizes_of(state_of(variant), Path("x.pt"))
    assert sizes == variant.sizes
    assert variant in adapter.alike(sizes)
    assert variant.file in adapter.resembling(sizes)


@pytest.mark.parametrize(
    ("file", "process", "arguments"),
    [
        ("128x128_diffusion.pt", DDPM(), {"num_heads": 4, "channel_mult": [1, 1, 2, 3, 4]}),
        ("64x64_diffusion.pt", DDPM("cosine"), {"attention_resolutions": [32, 16, 8]}),
        (
            "imagenet64_cond_270M_250K.pt",
            DDPM("cosine", 4000),
            {"time_scale": 1.0, "num_heads": 4, "num_classes": 1000},
        ),
        ("lsun_uncond_100M_2400K_bs64.pt", DDPM(), {"num_heads": 1, "scale_shift_norm": False}),
    ],
)
def test_what_weights_do_not_tell_is_known_of_published_files(
    file: str, process: DDPM, arguments: dict[str, Any]
) -> None:
    variant = adapter.by_file(file)
    assert variant is not None
    converted = convert(state_of(variant), Path(file), {})
    assert DDPM(**converted.process) == process
    assert converted.model.items() >= arguments.items()


@pytest.mark.parametrize(
    "file",
    [
        "cifar10_uncond_50M_500K.pt",
        pytest.param("512x512_diffusion.pt", marks=pytest.mark.slow),
        pytest.param("128x128_diffusion.pt", marks=pytest.mark.slow),
        pytest.param("lsun_uncond_100M_2400K_bs64.pt", marks=pytest.mark.slow),
    ],
)
def test_published_weights_fit_the_network_of_their_flags(file: str) -> None:
    variant = adapter.by_file(file)
    assert variant is not None
    converted = convert(state_of(variant), Path(file), {})
    with torch.device("meta"):
        network = families()["unet"].build(converted.model)
    assert isinstance(network, UNet) and network.input_size == (variant.input_size,) * 2
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.state.items()} == expected


def test_every_published_diffusion_model_has_a_name() -> None:
    """Upsamplers are recognised, and cannot be asked for."""
    assert [len(adapter.variants(kind)) for kind in KINDS] == [16, 4, 3]
    names = set(catalogue.entries("model", "classifier"))
    assert names.isdisjoint(catalogue.entries("upsampler"))
    assert set(catalogue.entries("model")) < set(zoo.names())


def test_half_precision_files_load_and_go_through_our_own_layout(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in small().items()}
    beside = {**OWN, "process": {"schedule": "cosine", "num_timesteps": 4000}}
    model = load(saved(tmp_path / "mine.pt", state, beside))
    denoiser = model.denoiser
    assert denoiser.process == DDPM("cosine", 4000) and denoiser.kind == "eps"
    assert denoiser.x_0_range == (-1.0, 1.0) and model.class_names == ("0",)
    assert {p.dtype for p in denoiser.network.parameters()} == {torch.float32}
    x, y = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    answer = denoiser(x, denoiser.process.level(1234), y)
    assert answer.v.isfinite().all() and answer.variance_fraction is not None

    again = load(write_safetensors(tmp_path / "ours", denoiser))
    assert describe(again.denoiser) == describe(denoiser)
    assert torch.equal(again.denoiser(x, denoiser.process.level(1234), y).v, answer.v)
    assert describe(build(describe(denoiser))) == describe(denoiser)


def test_a_zoo_name_finds_its_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load("ADM-256-uncond")
    text = str(caught.value)
    address = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
    assert f"{address}256x256_diffusion_uncond.pt" in text
    assert str(tmp_path / "pretrained_models") in text and "$SAG_DIT_WEIGHTS" in text
    saved(Path("pretrained_models") / "256x256_diffusion_uncond.pt", small(), OWN)
    model = load("ADM-256-uncond")
    assert model.name == "ADM-256-uncond" and model.denoiser.latent_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        (
            "256x256_diffusion.pt",
            {},
            r"not the published 256x256_diffusion.pt: found model_channel",
        ),
        ("mine.pt", {}, r"do not tell input_size and num_heads or num_head_channels.*mine.json"),
        ("mine.pt", {"learn_sigma": None, "num_classes": 9}, "a classifier, where a diffusion mod"),
    ],
)
def test_weights_that_do_not_tell_enough_are_refused(
    tmp_path: Path, name: str, changed: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        load(saved(tmp_path / name, small(**changed)))


def test_another_variant_is_told_by_name() -> None:
    uncond, upsampler = (
        adapter.by_file(name) for name in ("256x256_diffusion_uncond.pt", "64_256_upsampler.pt")
    )
    assert uncond is not None and upsampler is not None
    with pytest.raises(ValueError, match=r"num_classes=0, not 1000; it looks like 256x256_diff"):
        convert(state_of(uncond), Path("256x256_diffusion.pt"), {})
    with pytest.raises(ValueError, match=r"an upsampler.*it looks like 64_256_upsampler.pt"):
        convert(state_of(upsampler), Path("mine.pt"), {})


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("input_blocks.2.0.out_layers.3.weight", "looks like a UNet .*input_blocks.2.0.out_layers"),
        ("middle_block.1.norm.weight", r"1 missing: mid_block.attentions.0.group_norm.weight\n"),
        ("output_blocks.1.2.in_layers.0.weight", "its 4 input_blocks are not those of levels"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, lost: str, told: str) -> None:
    state = small()
    del state[lost]
    with pytest.raises(ValueError, match=told):
        load(saved(tmp_path / "mine.pt", state, OWN))


def test_heads_are_stated_beside_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "mine.pt", small(), OWN)
    with pytest.raises(ValueError, match=r"num_heads=2: a UNet's weights.*mine.json"):
        load(path, num_heads=2)
    by_width = load(path).denoiser.network
    saved(path, small(), {"model": {"input_size": 16, "num_heads": 2}})
    for one, other in zip(
        load(path).denoiser.network.parameters(), by_width.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_classifiers_load_by_name_and_path(tmp_path: Path) -> None:
    own = {"model": {"input_size": 16, "num_head_channels": 32}}
    state = small(learn_sigma=None, num_classes=9)
    saved(Path("pretrained_models") / "64x64_classifier.pt", state, own)
    named = load_classifier("ADM-classifier-64")
    assert named(torch.randn(2, 3, 16, 16), torch.tensor([0, 9])).shape == (2, 9)
    assert not any(parameter.requires_grad for parameter in named.parameters())
    with pytest.raises(ValueError, match=r"a diffusion model, where a classifier is expected"):
        load_classifier(saved(tmp_path / "mine.pt", small()))
    with pytest.raises(ValueError, match=r"no such classifier; expected ADM-classifier-64"):
        load_classifier("ADM-classifier-65")
