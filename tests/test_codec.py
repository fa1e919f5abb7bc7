"""Codecs: pixels and latents, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.codec import IdentityCodec, VAECodec, build_vae
from tests.data.making import save_vae


def pixels(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vae(**options: Any) -> Any:
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.5, **options},
    )


@pytest.fixture(scope="module")
def vae() -> Any:
    return small_vae()


@pytest.fixture
def folder(vae: Any, tmp_path: Path) -> Path:
    vae.save_pretrained(tmp_path)
    return tmp_path


def test_identity_returns_every_pixel_value() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = IdentityCodec().encode(every)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(IdentityCodec().decode(x), every)


def test_identity_rounds_and_clamps_as_published() -> None:
    x = torch.tensor([-2.0, -1.0, -0.0001, 0.0, 0.0039, 0.004, 1.0, 3.0]).reshape(1, 1, 2, 4)
    expected = torch.tensor([0, 0, 127, 128, 128, 128, 255, 255], dtype=torch.uint8)
    assert torch.equal(IdentityCodec().decode(x).flatten(), expected)
    # Low precision enters, but the arithmetic is float32: bfloat16 has no 255.5.
    assert IdentityCodec().decode(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16)).min() == 255


def test_vae_decodes_unscaled_latents(vae: Any) -> None:
    z = normal(2, 4, 4, 4)
    with torch.no_grad():
        expected = (127.5 * vae.decode(z).sample + 128).clamp(0, 255).to(torch.uint8)
    images = VAECodec(vae, slice_size=2).decode(z * 0.5)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images, expected)


def test_vae_encodes_mean_or_given_sample(vae: Any) -> None:
    images, noise = pixels(2, 3, 8, 8), normal(2, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    codec = VAECodec(vae, slice_size=2)
    assert torch.equal(codec.encode(images), posterior.mean * 0.5)
    drawn = codec.encode(images, noise)
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * 0.5)
    assert not drawn.requires_grad and not torch.equal(drawn, codec.encode(images))


@pytest.mark.parametrize(
    ("options", "scale", "shift"),
    [
        ({"scaling_factor": 0.25}, 0.25, 0.0),
        ({"scaling_factor": 0.25, "shift_factor": 0.3}, 0.25, 0.3),
        (
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            torch.tensor([0.5, 0.25, 0.125, 0.0625]).reshape(4, 1, 1),
            torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1),
        ),
    ],
    ids=["scale", "shift", "per channel"],
)
def test_scaling_is_the_autoencoders_own(options: Any, scale: Any, shift: Any) -> None:
    plain, other = small_vae(scaling_factor=1.0), small_vae(**options)
    z = normal(1, 4, 4, 4)
    x = (z - shift) * scale
    decoded, expected = VAECodec(other).decode(x), VAECodec(plain).decode(z)
    # Unscaling rounds, so a value on the edge between two pixels may fall to its other side.
    assert (decoded.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(VAECodec(plain).decode(x), expected)
    images = pixels(1, 3, 8, 8)
    torch.testing.assert_close(
        VAECodec(other).encode(images), (VAECodec(plain).encode(images) - shift) * scale
    )


@pytest.mark.parametrize("slice_size", [1, 3])
def test_image_does_not_depend_on_its_batch(vae: Any, slice_size: int) -> None:
    codec = VAECodec(vae, slice_size=slice_size)
    x, images, noise = normal(5, 4, 4, 4), pixels(5, 3, 8, 8), normal(5, 4, 4, 4, seed=1)
    decoded, encoded = codec.decode(x), codec.encode(images, noise)
    for i in range(5):
        assert torch.equal(codec.decode(x[i : i + 1])[0], decoded[i])
        assert torch.equal(codec.encode(images[i : i + 1], noise[i : i + 1])[0], encoded[i])


def test_never_more_than_a_slice_at_once(vae: Any) -> None:
    sizes: list[int] = []
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        for part in (vae.encoder, vae.decoder)
    ]
    codec = VAECodec(vae, slice_size=2)
    codec.decode(normal(5, 4, 4, 4))
    codec.encode(pixels(3, 3, 8, 8))
    for hook in hooks:
        hook.remove()
    assert sizes == [2] * 5


def test_mixed_precision_does_not_reach_the_pixels(vae: Any) -> None:
    codec, x = VAECodec(vae), normal(1, 4, 4, 4)
    expected = codec.decode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.decode(x), expected)
    rounded = x.to(torch.bfloat16)
    assert torch.equal(codec.decode(rounded), codec.decode(rounded.float()))


def test_folder_is_read_when_it_is_needed(folder: Path, vae: Any) -> None:
    codec = VAECodec(folder)
    x = normal(2, 4, 4, 4)
    assert codec.factor == 2 and codec.latent_channels == 4
    weights = folder / "diffusion_pytorch_model.safetensors"
    hidden = weights.rename(folder / "hidden")
    with pytest.raises(ValueError, match=r"vae=.*the autoencoder could not be loaded"):
        codec.decode(x)
    hidden.rename(weights)
    assert torch.equal(codec.decode(x), VAECodec(vae).decode(x))
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


def test_folder_of_a_half_precision_variant(folder: Path, vae: Any) -> None:
    half = small_vae().half()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(folder, variant="fp16")
    codec = VAECodec(folder)
    assert {parameter.dtype for parameter in codec.vae.parameters()} == {torch.float32}
    assert torch.equal(
        codec.decode(normal(1, 4, 4, 4)), VAECodec(half.float()).decode(normal(1, 4, 4, 4))
    )


def test_incomplete_weights_are_not_filled_with_random_ones(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["decoder.conv_in.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of .*first decoder\.conv_in\.weight"):
        VAECodec(folder).decode(normal(1, 4, 4, 4))


def test_damaged_weights_are_named(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"could not be loaded; expected undamaged weights"):
        VAECodec(folder).decode(normal(1, 4, 4, 4))


def test_config_tells_what_determines_pixels(folder: Path, vae: Any) -> None:
    config = VAECodec(vae).config()
    assert config["scaling_factor"] == 0.5 and config["slice_size"] == 1
    assert config["sha256"] == VAECodec(folder).config()["sha256"]
    assert VAECodec(folder, sha256="given").config()["sha256"] == "given"
    assert json.loads(json.dumps(config)) == config
    changed = small_vae()
    changed.decoder.conv_in.bias.data[0] += 1
    assert VAECodec(changed).config()["sha256"] != config["sha256"]
    assert IdentityCodec().config() == {"name": "identity"}


def test_codec_moves_in_place(folder: Path, vae: Any) -> None:
    assert IdentityCodec().to("cpu").factor == 1
    built = VAECodec(small_vae())
    assert built.to("meta") is built
    assert next(built.vae.parameters()).device.type == "meta"
    later = VAECodec(folder).to("meta")
    assert next(later.vae.parameters()).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(vae: Any) -> None:
    x = normal(2, 4, 4, 4)
    expected = VAECodec(vae).decode(x)
    moved = VAECodec(small_vae()).to("cuda")
    difference = moved.decode(x.cuda()).cpu().int() - expected.int()
    assert difference.abs().max() <= 1


def test_bad_arguments_are_refused(vae: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slice_size=0: expected 1 or more"):
        VAECodec(vae, slice_size=0)
    with pytest.raises(ValueError, match=r"expected a folder with the config\.json"):
        VAECodec(tmp_path)


@pytest.mark.parametrize(
    "stated", [{"block_out_channels": [2**20, 2**20]}, {"layers_per_block": 60}]
)
def test_a_config_larger_than_its_weights_costs_nothing(
    tmp_path: Path, stated: dict[str, Any]
) -> None:
    folder = save_vae(tmp_path / "vae")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    with pytest.raises(ValueError, match=r"vae=.*its config describes .* numbers, and its weights"):
        build_vae(folder)


def test_one_image_at_a_time_in_float32_is_the_codec_as_it_is(vae: Any) -> None:
    codec = VAECodec(vae)
    assert codec.computing(1) is codec
    assert IdentityCodec().computing(4, torch.bfloat16, True).config() == IdentityCodec().config()
    assert "dtype" not in codec.config() and "channels_last" not in codec.config()


@pytest.mark.parametrize("built", [True, False])
def test_decoding_in_batches_in_bfloat16_channels_last(vae: Any, folder: Path, built: bool) -> None:
    """Of a module, which stays as it is, and of a folder, which is read later."""
    plain = VAECodec(vae if built else folder)
    fast = plain.computing(2, torch.bfloat16, channels_last=True)
    z = normal(3, 4, 4, 4)
    images, expected = fast.decode(z), plain.decode(z)
    assert fast.vae.dtype == torch.bfloat16 and plain.vae.dtype == torch.float32
    assert images.is_contiguous() and images.dtype == torch.uint8 and images.shape[0] == 3
    assert 0 < (images.int() - expected.int()).abs().float().mean() < 3
    # An image depends on none of its neighbours, nor on padding.
    assert torch.equal(fast.decode(z[:1]), images[:1])
    encoded = fast.encode(images)
    assert encoded.dtype == torch.float32
    # The weights are the same file's.
    told, own = fast.config(), plain.config()
    assert told == {**own, "slice_size": 2, "dtype": "bfloat16", "channels_last": True}


def test_a_codec_decodes_at_least_one_image_at_a_time(vae: Any) -> None:
    with pytest.raises(ValueError, match="batch_size=0: expected 1 or more images at a time"):
        VAECodec(vae).computing(0)
