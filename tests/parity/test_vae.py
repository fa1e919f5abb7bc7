"""Autoencoders in the layout of VA-VAE's authors code as LightningDiT's own code does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sag_dit.checkpoints.loading import find_codec
from sag_dit.codec import VAECodec, from_pixels, to_pixels
from tests.parity.make_vae_goldens import CHANNELS, GOLDENS, images, statistics, weights

CLOSE = 3e-5
"""Rounding of some forty layers, relative to the largest value."""


def layout(kind: str) -> dict[str, list[int]]:
    with safe_open(GOLDENS, framework="pt") as file:
        found: dict[str, list[int]] = json.loads(file.metadata()["layouts"])[kind]
    return found


def trained_beside(state: dict[str, Tensor]) -> dict[str, Any]:
    """As Lightning saves VA-VAE's training: with a discriminator and the network aligned to."""
    beside = {"loss.discriminator.main.0.weight": torch.ones(2), "foundation_model.model.a": 1}
    return {"state_dict": {**state, **beside}, "epoch": 3, "global_step": 9}


HELD: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "vavae": trained_beside,
    "marvae": lambda state: {"model": state},
}


def assert_close(found: Tensor, golden: Tensor) -> None:
    assert found.shape == golden.shape
    assert float((found - golden).abs().max()) <= CLOSE * float(golden.abs().max())


@pytest.mark.parametrize("kind", ["vavae", "marvae"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_it_codes_as_its_authors_do(kind: str, named: str, tmp_path: Path) -> None:
    golden = load_file(GOLDENS)
    file = tmp_path / "vavae-imagenet256-f16d32-dinov2.pt"
    torch.save(HELD[kind](weights(layout(kind))), file)
    torch.save(statistics(), tmp_path / "latents_stats.pt")
    codec = find_codec(str(tmp_path if named == "folder" else file))
    assert isinstance(codec, VAECodec)
    assert (codec.kind, codec.factor, codec.latent_channels) == ("AutoencoderKL", 16, CHANNELS)
    # The decoder's attention, which MAR's has not, and the encoder's beside the middle's.
    names = set(codec.vae.state_dict())
    assert "encoder.down_blocks.4.attentions.1.to_q.weight" in names
    assert ("decoder.up_blocks.0.attentions.2.to_q.weight" in names) == (kind == "vavae")
    mean, std = codec.posterior(images())
    scale = statistics()["std"]
    assert_close(mean * scale + statistics()["mean"], golden[f"{kind}.mean"])
    assert_close(std * scale, golden[f"{kind}.std"])
    assert_close(codec.vae.decode(golden[f"{kind}.mean"]).sample, golden[f"{kind}.decoded"])
    pixels = codec.decode(codec.encode(images()))
    differs = from_pixels(pixels) - from_pixels(to_pixels(golden[f"{kind}.decoded"]))
    assert float(differs.abs().max()) < 0.01  # a level of 256


def test_a_part_of_a_whole_model_with_stable_diffusions_channels(tmp_path: Path) -> None:
    """Four channels have its scaling factor; safetensors, and the names of a whole model."""
    few = {"encoder.conv_out": 8, "quant_conv": 8, "post_quant_conv": 4}
    shapes = layout("vavae")
    for name, shape in shapes.items():
        stem = name.rpartition(".")[0]
        if stem in few:
            shape[0] = few[stem]
        if name in ("quant_conv.weight", "post_quant_conv.weight", "decoder.conv_in.weight"):
            shape[1] = 8 if name == "quant_conv.weight" else 4
    named = {f"first_stage_model.{name}": each for name, each in weights(shapes).items()}
    save_file({**named, "model.diffusion_model.x": torch.ones(1)}, tmp_path / "sd.safetensors")
    codec = find_codec(str(tmp_path / "sd.safetensors"))
    assert isinstance(codec, VAECodec)
    assert codec.latent_channels == 4 and codec.settings["scaling_factor"] == 0.18215
    assert codec.encode(images()).shape == (2, 4, 2, 2)


def with_shape(name: str, *shape: int) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, name: torch.ones(shape)}


def without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: each for name, each in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("decoder.mid.attn_1.q.bias"), r"the first is decoder.mid_block.attentions.0.to_q"),
        (without("decoder.conv_in.weight"), r"such as VA-VAE's .pt"),
        (lambda state: {"blocks.0.weight": torch.ones(1)}, r"found blocks.0.weight"),
        (lambda state: [1, 2], r"found no mapping of names to tensors"),
        (
            lambda state: {**state, "encoder.conv_out.weight": torch.ones(32, 128, 3, 3)},
            "quantises",
        ),
        (
            lambda state: {
                **state,
                "encoder.down.1.block.1.conv2.weight": torch.ones(40, 32, 3, 3),
            },
            "expected multiples of 32",
        ),
    ],
)
def test_what_is_none_is_refused(
    change: Callable[[dict[str, Any]], Any], told: str, tmp_path: Path
) -> None:
    torch.save(change(weights(layout("vavae"))), tmp_path / "weights.pt")
    torch.save(statistics(), tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match=told):
        find_codec(str(tmp_path))


def test_statistics_and_a_choice_of_files_are_asked_for(tmp_path: Path) -> None:
    torch.save(weights(layout("vavae")), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"no latents_stats.pt beside it: expected the mean"):
        find_codec(str(tmp_path))
    (tmp_path / "more.ckpt").touch()
    with pytest.raises(ValueError, match=r"holds more.ckpt, weights.pt: expected one file"):
        find_codec(str(tmp_path))
