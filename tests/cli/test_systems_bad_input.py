"""Weights, classifiers and conditions that do not go together are refused before anything is drawn.

Files of published sizes take no room: all values of a tensor are one stored number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.checkpoints import files, formats, zoo
from sag_dit.checkpoints.loading import full_config
from sag_dit.models import DiT
from sag_dit.models.unet import adapter
from tests import stand_ins
from tests.checkpoints.openai import state_of

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stand-ins: ADM at 128 pixels with its classifier, and without classes."""
    folder = tmp_path_factory.mktemp("weights")
    stand_ins.save_openai(folder, "128x128_diffusion.pt")
    stand_ins.save_openai(folder, "256x256_diffusion_uncond.pt")
    stand_ins.save_openai(folder, "128x128_classifier.pt")
    return folder


@pytest.fixture
def refused(
    in_process: Command, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run ``sample.py``, which has to fail at once, and return its error."""
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(weights))

    def run(*arguments: str) -> str:
        outcome = in_process("sample", "steps=2", "num_images=2", "out=o", *arguments)
        assert outcome.code == 1, outcome.out + outcome.err
        assert "Traceback" not in outcome.err
        assert outcome.evaluations == 0
        assert not (tmp_path / "o").exists()
        error: str = outcome.err[outcome.err.index("error: ") :]
        assert len(error.splitlines()) <= 8
        return error

    return run


CLASSIFIER = "guidance.classifier.classifier=ADM-classifier-128"

TOGETHER = {
    # guidance by a classifier
    "ckpt=ADM-128 classifier_scale=1": (
        "needs a classifier of noisy images",
        "set guidance.classifier.classifier to a published name or a path",
    ),
    "ckpt=ADM-128 classifier_scale=1 guidance.classifier.classifier=ADM-128": (
        "classifier='ADM-128': no such classifier",
        "expected ADM-classifier-64, ADM-classifier-128",
    ),
    "ckpt=ADM-128 classifier_scale=1 guidance.classifier.classifier=ADM-classifier-256": (
        "ADM-classifier-256: the weights are not here",
        "download https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_class",
    ),
    f"ckpt=ADM-256-uncond classifier_scale=1 {CLASSIFIER} classes=[1000]": (
        "class 1000 does not exist: expected a number from 0 to 999",
    ),
    f"ckpt=ADM-128 guidance=adm128 classifier_scale=0.5 {CLASSIFIER}": (
        "classifier.form=mean: it shifts the mean of an ancestral step, and the sampler is DDIM",
        "use sampler=ddpm, or guidance.classifier.form=score",
    ),
    f"ckpt=digits classifier_scale=1 {CLASSIFIER}": (
        "the classifier sees images (3, 32, 32), and the model's are (1, 8, 8)",
        "one of the model's size",
    ),
    "ckpt=ADM-classifier-128": (
        "ckpt=ADM-classifier-128: a classifier, which guides and does not draw",
        "set guidance.classifier.classifier=ADM-classifier-128",
    ),
    # conditions
    "ckpt=ADM-256-uncond classes=[3]": ("class 3 does not exist", "unconditional", "classes out"),
    "ckpt=ADM-256-uncond cfg_scale=1.5": ("cfg_scale=1.5", "no null condition", "cfg_scale=1"),
    "ckpt=ADM-128 classes=[1000]": ("class 1000 does not exist", "0 to 999"),
    "ckpt=ADM-128 prompt=corgi": (
        "ckpt=ADM-128: no diffusers pipeline, which takes no prompt; ask for classes=... instead",
    ),
    # reading attention
    "ckpt=ADM-128 guidance=adm128 sag_scale=0.1 guidance.sag.heads=3": (
        "sag.heads=3: the 32 channels of layer up_blocks.2.attentions.2 do not divide",
        "expected a divisor, or null",
    ),
    "ckpt=ADM-128 sag_scale=0.1 guidance.sag.layer=output_blocks.9": (
        "layer 'output_blocks.9' does not exist",
        "output_blocks.8",
    ),
    "ckpt=digits sag_scale=1 guidance.sag.heads=5": ("sag.heads=5: the ", "layer blocks."),
}


@pytest.mark.parametrize("arguments", TOGETHER)
def test_what_does_not_go_together(refused: Callable[..., str], arguments: str) -> None:
    error = refused(*arguments.split(" "))
    for part in TOGETHER[arguments]:
        assert part in error


def thin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes, all of a tensor's values being one number in memory and in a file."""
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


def of(name: str) -> dict[str, Tensor]:
    """The shapes of a published file of openai's, at their full size."""
    variant = adapter.by_file(name)
    assert variant is not None
    return thin(state_of(variant))


def of_dit(side: int) -> dict[str, Tensor]:
    """A DiT-XL/2 for latents of this side, whose positions are its own."""
    network = DiT(2, 2, 4, 1152, 1, 16, num_classes=1000)
    positions = DiT(side, 2, 4, 1152, 1, 16, num_classes=1000).pos_embed.detach()
    first = {name: tensor for name, tensor in network.state_dict().items()}
    others = {
        name.replace("blocks.0.", f"blocks.{i}."): tensor
        for name, tensor in first.items()
        if name.startswith("blocks.0.")
        for i in range(1, 28)
    }
    return {**thin({**first, **others}), "pos_embed": positions}


@pytest.fixture
def thin_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of a published size hold little, which are refused otherwise."""
    monkeypatch.setattr(files, "refuse_spread", lambda *_: None)


VARIANTS = {
    # classes, resolution, channels, another family, a classifier and an upsampler
    "256x256_diffusion_uncond.pt": ("ADM-256", "256x256_diffusion.pt", "num_classes=0, not 1000"),
    "256x256_diffusion.pt": ("ADM-256-uncond", "256x256_diffusion_uncond.pt", "num_classes=1000"),
    "512x512_diffusion.pt": ("ADM-256", "256x256_diffusion.pt", "channel_mult=(0.5, 1, 1, 2, 2"),
    "64_256_upsampler.pt": ("ADM-256", "256x256_diffusion.pt", "in_channels=6, not 3"),
    "imagenet64_cond_270M_250K.pt": ("ADM-64", "64x64_diffusion.pt", "resblock_updown=False"),
    "64x64_classifier.pt": ("ADM-64", "64x64_diffusion.pt", "a classifier, where a diffusion"),
}


def config_of(name: str) -> dict[str, Any]:
    """What is known of a published name's file, whose weights are not copied."""
    path = zoo.locate(name).path
    return full_config(formats.read(path, ema=True))


@pytest.mark.parametrize("held", VARIANTS)
def test_a_file_of_another_variant_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    name, file, difference = VARIANTS[held]
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path))
    torch.save(of(held), tmp_path / file)
    with pytest.raises(ValueError) as caught:
        config_of(name)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / file}: ")
    assert difference in error
    assert f"it looks like {held}" in error


@pytest.mark.usefixtures("thin_files")
def test_a_dit_of_another_resolution_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path))
    file = tmp_path / "DiT-XL-2-512x512.pt"
    torch.save(of_dit(32), file)
    with pytest.raises(ValueError, match=r"it looks like DiT-XL-2-256x256\.pt") as caught:
        config_of("DiT-XL-2-512")
    told = f"{file}: not the published {file.name}: found input_size=32, not 64"
    assert str(caught.value).startswith(told)
    torch.save(of_dit(64), file)
    assert config_of("DiT-XL-2-512")["model"]["input_size"] == 64


@pytest.mark.usefixtures("thin_files")
def test_a_classifier_of_another_size_says_which(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "128x128_classifier.pt"
    torch.save(of("256x256_classifier.pt"), path)
    with_it = ("ckpt=ADM-128", "classifier_scale=1", f"guidance.classifier.classifier={path}")
    error = refused(*with_it)
    assert f"{path}: not the published 128x128_classifier.pt: found channel_mult=" in error
    assert "it looks like 256x256_classifier.pt" in error


def test_classes_of_a_text_model(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "stable"
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DCondition"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    error = refused(f"ckpt={folder}", "classes=[3]")
    assert f"{folder}: a text model, StableDiffusionPipeline; pass prompt='...'" in error
    both = refused(f"ckpt={folder}", "classes=[3]", "prompt=corgi")
    assert "prompt: expected it alone" in both
