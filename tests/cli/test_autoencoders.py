"""Autoencoders other than AutoencoderKL: their own statistics, from encoding to drawn images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sag_dit.checkpoints import load
from sag_dit.codec import STATISTICS_FILE, VAECodec, from_pixels, to_pixels
from sag_dit.data.latents import LatentData
from tests.closeness import assert_near
from tests.data.making import image_folder

Command = Callable[..., Any]

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**KL, "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.1},
    "AsymmetricAutoencoderKL": {
        "down_block_types": KL["down_block_types"],
        "up_block_types": KL["up_block_types"],
        "down_block_out_channels": (8, 8),
        "up_block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
    },
    "VQModel": {**KL, "vq_embed_dim": 5, "latent_channels": 4, "num_vq_embeddings": 16},
    "AutoencoderDC": {
        "latent_channels": 6,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "scaling_factor": 0.41407,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    },
}
CHANNELS = {"AutoencoderKL": 4, "AsymmetricAutoencoderKL": 4, "VQModel": 5, "AutoencoderDC": 6}


def save(kind: str, folder: Path, **options: Any) -> Any:
    """Random weights of one of diffusers' classes in its own layout; return the module."""
    torch.manual_seed(0)
    made = getattr(diffusers, kind)(**{**TINY[kind], **options})
    made.save_pretrained(folder)
    return made.eval().requires_grad_(False)


def pictures(count: int = 4, side: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)
    ).byte()


def latent(module: Any, images: Tensor) -> Tensor:
    """z as diffusers' own code gives it."""
    found = module.encode(images)
    for name in ("latent", "latents"):
        if hasattr(found, name):
            return getattr(found, name)  # type: ignore[no-any-return]
    return found.latent_dist.mean  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", TINY)
def test_latents_are_scaled_as_the_config_says(kind: str, tmp_path: Path) -> None:
    """x_0 = (z - shift) scale, and back to what the autoencoder itself decodes, from a folder."""
    module, codec = save(kind, tmp_path / "vae"), VAECodec(tmp_path / "vae", slice_size=4)
    assert (codec.factor, codec.latent_channels) == (2, CHANNELS.get(kind, 4))
    assert codec.kind == codec.config()["name"] == kind
    pixels = pictures()
    z = latent(module, from_pixels(pixels))
    scale = module.config.scaling_factor
    shift = module.config.get("shift_factor") or 0.0
    x_0 = codec.encode(pixels)
    assert_near(x_0, (z - shift) * scale)
    # The same image as its own round trip, within the rounding of scaling there and back.
    expected = to_pixels(module.decode(z).sample).int()
    assert (codec.decode(x_0).int() - expected).abs().max() <= 1
    # A point has no spread, a distribution its own.
    mean, std = codec.posterior(pixels)
    assert torch.equal(mean, x_0)
    is_point = kind in ("VQModel", "AutoencoderDC", "AutoencoderTiny")
    assert bool((std == 0).all()) is is_point
    noise = torch.ones_like(x_0)
    assert_near(codec.encode(pixels, noise), x_0 + std)
    # The module itself is the same as its folder.
    assert torch.equal(VAECodec(module, slice_size=4).encode(pixels), x_0)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_a_file_of_statistics_makes_latents_standard(kind: str, tmp_path: Path) -> None:
    """As VA-VAE's: mean 0 and std 1 of every channel, over the images that were measured."""
    module = save(kind, tmp_path / "vae")
    pixels = pictures(8)
    z = latent(module, from_pixels(pixels))
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    torch.save({"mean": mean, "std": std}, tmp_path / "vae" / STATISTICS_FILE)
    codec = VAECodec(tmp_path / "vae", slice_size=8)
    x_0 = codec.encode(pixels)
    assert_near(x_0, (z - mean) / std)
    assert x_0.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x_0.std((0, 2, 3)) - 1).abs().max() < 1e-4
    expected = to_pixels(module.decode(z).sample).int()
    assert (codec.decode(x_0).int() - expected).abs().max() <= 1
    # They are part of what determines pixels.
    assert codec.config()["latents_mean"] == pytest.approx(mean.flatten().tolist())


def test_vavaes_layout(tmp_path: Path) -> None:
    """f16d32: five levels, 32 channels; its own config states a scaling that the file replaces."""
    options = {
        "block_out_channels": (4,) * 5,
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        "latent_channels": 32,
    }
    save("AutoencoderKL", tmp_path, **options, scaling_factor=0.18215, shift_factor=None)
    statistics = {"mean": torch.randn(1, 32, 1, 1), "std": torch.rand(1, 32, 1, 1) + 0.5}
    torch.save(statistics, tmp_path / STATISTICS_FILE)
    codec = VAECodec(tmp_path)
    assert (codec.factor, codec.latent_channels) == (16, 32)
    assert codec.settings["scaling_factor"] == 1.0
    pixels = pictures(2, 32)
    mean, _ = codec.posterior(pixels)
    z = latent(codec.vae, from_pixels(pixels))
    assert_near(mean, (z - statistics["mean"]) / statistics["std"])


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ({"mean": torch.zeros(3), "std": torch.ones(3)}, "it has 3 means and 3 stds"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "std above 0"),
        ({"mean": torch.zeros(4)}, "expected tensors mean and std"),
        ([1, 2], "expected tensors mean and std"),
        (b"no file of torch.save", "expected tensors mean and std"),
    ],
)
def test_a_bad_file_of_statistics_is_told(file: Any, told: str, tmp_path: Path) -> None:
    save("AutoencoderKL", tmp_path)
    place = tmp_path / STATISTICS_FILE
    place.write_bytes(file) if isinstance(file, bytes) else torch.save(file, place)
    with pytest.raises(ValueError, match=rf"{STATISTICS_FILE}: expected tensors") as error:
        VAECodec(tmp_path)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "AutoencoderOobleck"}, "expected an AutoencoderKL, .* 'AutoencoderOobl"),
        ({"latents_mean": [0.0] * 3}, "latents_mean has 3 numbers: expected one for each of its 4"),
        ({"scaling_factor": "much"}, "scaling_factor="),
    ],
)
def test_a_config_of_another_kind_is_told(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save("AutoencoderKL", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=told):
        VAECodec(tmp_path)


class Halves(nn.Module):
    """Means of two by two pixels, with a spread."""

    factor, latent_channels = 2, 3

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.latent_channels = channels
        self.latents_std = torch.full((3, 1, 1), 0.25)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = nn.functional.avg_pool2d(images, 2)
        return mean, torch.full_like(mean, 0.1)

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z, scale_factor=2)


def test_a_module_of_ones_own() -> None:
    codec, pixels = VAECodec(Halves(), slice_size=3), pictures()
    mean, std = codec.posterior(pixels)
    halves = nn.functional.avg_pool2d(from_pixels(pixels), 2)
    assert_near(mean, halves * 4)
    assert_near(std, torch.full_like(std, 0.4))
    expected = to_pixels(nn.functional.interpolate(halves, scale_factor=2)).int()
    assert (codec.decode(mean).int() - expected).abs().max() <= 1
    with pytest.raises(ValueError, match=r"vae=Linear: lacks encode, decode, factor, latent_chan"):
        VAECodec(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"latents_std has 3 numbers: expected one .* 4 channels"):
        VAECodec(Halves(4))
    wrong = Halves()
    wrong.factor = 4
    with pytest.raises(ValueError, match=r"are \(3, 4, 4\): expected \(3, 2, 2\), by its 3"):
        VAECodec(wrong).encode(pixels)


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny", "VQModel"])
def test_encoded_trained_and_drawn(kind: str, in_process: Command, tmp_path: Path) -> None:
    save(kind, tmp_path / "vae")
    image_folder(tmp_path / "photos", side=24)
    encode = ("data.root=photos", "data.size=16", "workers=0", "trainer.accelerator=cpu")
    done = in_process("encode", *encode, "vae=vae", "dtype=float32", "out=latents")
    assert done.code == 0, done.err
    data = LatentData(tmp_path / "latents", images=tmp_path / "photos", workers=0, batch_size=4)
    train = ("experiment=digits", "data=latents", "data.root=latents", "data.batch_size=4")
    size = ("resolution=16", "model.depth=1", "data.workers=0", "max_steps=2", "out=run")
    done = in_process("train", *train, *size)
    assert done.code == 0, done.err
    model = load("run")
    assert isinstance(model.codec, VAECodec) and model.codec.kind == kind
    assert model.image_shape == (3, 16, 16)
    # What was stored is what the codec encodes of the crops, mirrored where they are.
    codec, batch = model.codec.computing(1), next(iter(data.train_dataloader()))
    moments, _, _, pixels = batch
    assert_near(moments[:, 0], codec.encode(pixels))
    cpu = ("trainer.accelerator=cpu", "trainer.devices=1")
    draw = ("ckpt=run", *cpu, "num_images=1", "steps=2", "gallery.num=0", "sag_scale=0")
    done = in_process("sample", *draw, "out=drawn")
    assert done.code == 0, done.err
    if kind == "AutoencoderDC":
        from sag_dit.checkpoints.export import export

        with pytest.raises(ValueError, match=r"a AutoencoderDC, where it decodes latents with an"):
            export(model, "exported", "diffusers")


def test_latents_tell_the_images_that_they_are_of(in_process: Command, tmp_path: Path) -> None:
    save("AutoencoderTiny", tmp_path / "vae")
    image_folder(tmp_path / "photos", side=24)
    image_folder(tmp_path / "others", side=25)
    encode = ("data.root=photos", "data.size=16", "workers=0", "trainer.accelerator=cpu")
    assert in_process("encode", *encode, "vae=vae", "out=latents").code == 0
    with pytest.raises(ValueError, match=r"data.images=others: 8 images that are not the 8 that"):
        _ = LatentData("latents", images="others", workers=0).dataset
    train = ("experiment=digits", "data=latents", "data.root=latents", "data.batch_size=4")
    size = ("resolution=16", "model.depth=1", "data.workers=0", "max_steps=1", "out=run")
    done = in_process("train", *train, *size, "data.images=photos")
    assert done.code == 1 and "data.images=photos: MSE does not see pixels" in done.err
