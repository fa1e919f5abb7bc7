"""Names: the bundled and the published models, the hub, and the autoencoders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sag_dit import catalogue
from sag_dit.checkpoints import load, zoo
from sag_dit.models import DiT
from tests.checkpoints.conftest import Same, edit_json
from tests.conftest import MakeDiT


@pytest.mark.parametrize(
    ("ckpt", "nearest"),
    [("digit", "digits"), ("DiT-XL", "DiT-XL-2"), ("dit-xl-2-512", "DiT-XL-2-512")],
)
def test_unknown_names_come_with_the_nearest(ckpt: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load(ckpt)
    text = str(caught.value)
    assert f"ckpt={ckpt!r}: no such checkpoint; did you mean " in text
    assert nearest in text.splitlines()[0]
    assert f"looked for {tmp_path / ckpt}" in text and len(text.splitlines()) <= 6


def test_missing_files_are_not_sought_at_the_hub(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    for ckpt in ("outputs/run-1f3a", "weights/model.pt"):
        with pytest.raises(ValueError, match="no such checkpoint") as caught:
            load(ckpt)
        assert "repository outputs" not in str(caught.value)
        assert "repository weights" not in str(caught.value)


@pytest.mark.parametrize("name", ["DiT-XL-2", "DiT-XL-2-256"])
def test_published_model_without_network(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load(name)
    text = str(caught.value)
    for part in (
        "DiT-XL-2-256x256.pt",
        str(tmp_path / "pretrained_models"),
        "$SAG_DIT_WEIGHTS",
        "facebook/DiT-XL-2-256",
        "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
        "ckpt=PATH",
    ):
        assert part in text
    assert len(text.splitlines()) <= 4


def test_published_models_are_found_locally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixel_dit: DiT, same: Same
) -> None:
    here = Path("pretrained_models")
    (here / "DiT-XL-2-512").mkdir(parents=True)
    (here / "DiT-XL-2-512" / "model_index.json").write_text("{}")
    assert zoo.locate("DiT-XL-2-512").path == here / "DiT-XL-2-512"
    torch.save(pixel_dit.state_dict(), here / "DiT-XL-2-512x512.pt")
    assert zoo.locate("DiT-XL-2-512").path == here / "DiT-XL-2-512x512.pt"
    elsewhere = tmp_path / "weights"
    elsewhere.mkdir()
    shutil.copy(here / "DiT-XL-2-512x512.pt", elsewhere / "DiT-XL-2-256x256.pt")
    monkeypatch.setenv(zoo.WEIGHTS_FOLDER, str(elsewhere))
    model = load("DiT-XL-2-256")
    assert same(model.denoiser.network, pixel_dit)
    assert model.name == "DiT-XL-2"


def test_path_of_a_published_name_is_a_path(flat: Path, pixel_dit: DiT, same: Same) -> None:
    renamed = flat.rename("digits")
    assert same(load(Path("digits")).denoiser.network, pixel_dit)
    assert same(load("./digits").denoiser.network, pixel_dit)
    assert load(renamed.absolute()).name == "digits"


def test_names_are_fit_for_folders(flat: Path) -> None:
    assert load(flat.rename("my model, step=3 (ema).pt")).name == "my-model-step-3-ema-"


@pytest.mark.parametrize(
    ("name", "shape", "first"),
    [
        ("digits", (1, 8, 8), "0"),
        ("patches", (3, 32, 32), "astronaut"),
        ("emoji", (4, 16, 16), "active person"),
    ],
)
def test_bundled_model_is_loaded_by_name(
    name: str, shape: tuple[int, int, int], first: str
) -> None:
    model = load(name)
    beside = catalogue.entries()[name].file.replace("model.safetensors", "autoencoder")
    assert model.name == name and (model.vae or beside).endswith(beside)
    assert (model.codec.factor > 1) == (model.vae is not None)
    assert model.denoiser.latent_shape == shape
    assert model.class_names[0] == first
    assert model.denoiser.null(1) is not None
    x = torch.zeros(2, *shape)
    prediction = model.denoiser(x, model.denoiser.process.level(500), torch.tensor([3, 7]))
    assert prediction.v.isfinite().all() and not torch.equal(prediction.v[0], prediction.v[1])


def test_bundled_model_that_is_missing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = {"absent": catalogue.Entry("absent", "bundled", file="absent/model.safetensors")}
    monkeypatch.setattr(catalogue, "entries", lambda *kinds: absent)
    with pytest.raises(ValueError, match=r"bundled model is missing from .*experiment=absent"):
        load("absent")


@pytest.fixture
def latent(tiny_dit: DiT, tmp_path: Path) -> Path:
    path = tmp_path / "latent.pt"
    torch.save(tiny_dit.state_dict(), path)
    return path


def test_missing_autoencoder_is_told_before_sampling(latent: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load(latent)
    text = str(caught.value)
    assert "vae=stabilityai/sd-vae-ft-ema: the autoencoder" in text and "vae=PATH" in text
    assert str(tmp_path / "pretrained_models" / "sd-vae-ft-ema") in text


@pytest.mark.parametrize("vae", ["mse", "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"])
def test_autoencoders_are_found_by_their_names(latent: Path, vae_folder: Path, vae: str) -> None:
    shutil.copytree(vae_folder, "pretrained_models/sd-vae-ft-mse")
    model = load(latent, vae=vae)
    assert model.codec.factor == 2 and model.vae == vae


def test_training_args_choose_the_autoencoder(tiny_dit: DiT, vae_folder: Path) -> None:
    from argparse import Namespace

    torch.save({"ema": tiny_dit.state_dict(), "args": Namespace(vae="mse")}, "trained.pt")
    shutil.copytree(vae_folder, "pretrained_models/sd-vae-ft-mse")
    assert load("trained.pt").vae == "mse"


def test_autoencoder_may_be_a_pipelines(latent: Path, pipeline: Path) -> None:
    assert load(latent, vae=pipeline).codec.config() == load(pipeline).codec.config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "expected an AutoencoderKL, .*and its config says"),
        ({"latent_channels": 16}, "latents have 16 channels and the model has 4"),
    ],
)
def test_autoencoders_that_do_not_fit(
    latent: Path, vae_folder: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(vae_folder, "other")
    edit_json(Path("other/config.json"), **change)
    with pytest.raises(ValueError, match=message):
        load(latent, vae="other")


def test_autoencoder_without_weights(latent: Path, vae_folder: Path) -> None:
    shutil.copytree(vae_folder, "other")
    Path("other/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="other: no weights, or not all of them"):
        load(latent, vae="other")
    Path("other/config.json").unlink()
    Path("other/diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"other: expected a folder with the config\.json"):
        load(latent, vae="other")


def test_other_channels_need_their_own_autoencoder(make_dit: MakeDiT) -> None:
    torch.save(make_dit(in_channels=16).state_dict(), "sixteen.pt")
    with pytest.raises(ValueError, match=r"a model of 16 channels: expected .*vae=PATH"):
        load("sixteen.pt")
