"""What bfloat16 and TF32 change of images, decoded latents and losses."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Trainer
from torch import Tensor

import sag_dit
from sag_dit.codec import VAECodec, to_pixels
from sag_dit.evaluation.features import exact
from sag_dit.guidance import CFG, SAG
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Settings
from sag_dit.training.module import DiffusionModule
from sag_dit.training.pending import PendingRequests
from sag_dit.training.predicting import Predictor
from tests.gpu.conftest import Stated
from tests.gpu.making import differences, requests, train_digits

pytestmark = pytest.mark.gpu

SETTINGS = Settings(
    steps=20,
    batch_size=4,
    guidance=(SAG(scale=3.0, layer="blocks.5", interval=(0.5, 1.0)), CFG(scale=1.5)),
)
"""Those of the bundled patches, whose threshold is not spared: masks may flip."""


def predicted(device: str, folder: Path, precision: str) -> tuple[Tensor, Tensor]:
    """Draw the bundled patches as sample.py does; return x_0 and its pixels."""
    steps: list[SampleStep] = []
    model = sag_dit.load("patches")
    module = DiffusionModule(model, settings=SETTINGS, watch=steps.append)
    make = partial(Trainer, accelerator=device, devices=1, precision=precision)
    data = PendingRequests(requests(4), 4)
    Predictor(make, folder).trainer.predict(module, datamodule=data, return_predictions=False)
    assert len(steps) == SETTINGS.steps
    return steps[-1].x, model.codec.decode(steps[-1].x)


@pytest.mark.parametrize(
    ("name", "precision", "matmul", "most", "mean"),
    [("bf16-mixed", "bf16-mixed", "highest", 64, 2), ("TF32", "32-true", "high", 32, 0.25)],
)
def test_images(
    device: str,
    stated: Stated,
    tmp_path: Path,
    name: str,
    precision: str,
    matmul: str,
    most: float,
    mean: float,
) -> None:
    x, images = predicted(device, tmp_path, "32-true")
    torch.set_float32_matmul_precision(matmul)
    other_x, other = predicted(device, tmp_path, precision)
    greatest, average = differences(other, images)
    stated(f"sampling in {name}: greatest difference in pixel values from fp32", greatest, most)
    stated(f"sampling in {name}: mean difference in pixel values from fp32", average, mean)
    # TF32 is nothing to a CPU.
    acts = device == "cuda" or name == "bf16-mixed"
    assert torch.equal(x, other_x) is not acts


FIRST = 8
"""Losses that are compared one by one."""


@pytest.mark.parametrize(
    ("name", "argument", "bound"),
    [("bf16-mixed", "trainer.precision=bf16-mixed", 0.02), ("TF32", "matmul=high", 0.005)],
)
def test_losses(
    device: str, stated: Stated, tmp_path: Path, name: str, argument: str, bound: float
) -> None:
    steps = 60 if device == "cuda" else 12
    plain = train_digits(tmp_path / "plain", device, steps)
    other = train_digits(tmp_path / "other", device, steps, argument)
    assert len(plain) == len(other) == steps
    assert plain[-1] < plain[0] and all(map(math.isfinite, other))
    apart = [abs(a / b - 1) for a, b in zip(other, plain, strict=True)]
    drift = abs(sum(other) / sum(plain) - 1)
    # Every step of AdamW amplifies rounding, so only the first losses have a bound of their own.
    first = max(apart[:FIRST])
    stated(f"training in {name}: greatest relative difference of {steps} losses", max(apart))
    stated(f"training in {name}: the same of the first {FIRST} losses", first, bound)
    stated(f"training in {name}: relative difference of the mean loss", drift, bound)
    acts = device == "cuda" or name == "bf16-mixed"
    assert (max(apart) > 0) is acts


@pytest.fixture(scope="module")
def vae(device: str) -> Any:
    """Stable Diffusion's autoencoder with random weights; on the CPU an eighth as wide."""
    wide, groups = ((128, 256, 512, 512), 32) if device == "cuda" else ((16, 32, 64, 64), 4)
    torch.manual_seed(0)
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=wide,
        layers_per_block=2,
        norm_num_groups=groups,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    return made.eval().requires_grad_(False)


def latents(side: int) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))


def test_decoding_agrees_with_the_cpu(device: str, stated: Stated, vae: Any) -> None:
    z = latents(8)
    there = VAECodec(vae).decode(z)
    assert there.float().std() > 5, "pictures of one colour would agree whatever happens"
    here = VAECodec(deepcopy(vae).to(device)).decode(z.to(device))
    greatest, average = differences(here, there)
    stated("VAE decoding: greatest difference in pixel values from the CPU", greatest, 4)
    stated("VAE decoding: mean difference in pixel values from the CPU", average, 0.5)


def timed(function: Any, device: str) -> tuple[Tensor, float]:
    """Return a result and the least seconds of four calls, of which the first warms up."""

    def once() -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return function(), min(once() for _ in range(3))


def test_decoding_in_bfloat16(device: str, stated: Stated, vae: Any) -> None:
    """Against float32 without TF32; under a trainer's bfloat16 the codec itself stays as it is."""
    here, coarse = deepcopy(vae).to(device), deepcopy(vae).to(device, torch.bfloat16)
    codec, x = VAECodec(here), latents(32 if device == "cuda" else 8).to(device)
    plain, seconds = timed(partial(codec.decode, x), device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(codec.decode(x), plain)
    with exact(torch.device(device)):
        true = codec.decode(x)
    greatest, average = differences(plain, true)
    stated("VAE decoding as it is: greatest difference in pixel values from IEEE fp32", greatest, 4)
    stated("VAE decoding as it is: mean difference in pixel values from IEEE fp32", average, 0.5)

    def in_bfloat16() -> Tensor:
        with torch.no_grad():
            z = (x / 0.18215).to(torch.bfloat16)
            return torch.cat([to_pixels(coarse.decode(part).sample) for part in z.split(1)])

    rough, fewer_seconds = timed(in_bfloat16, device)
    greatest, average = differences(rough, true)
    assert greatest > 0
    stated("VAE decoding in bf16: greatest difference in pixel values from IEEE fp32", greatest, 32)
    stated("VAE decoding in bf16: mean difference in pixel values from IEEE fp32", average, 4)
    stated("VAE decoding in bf16: time / time as it is", fewer_seconds / seconds)
