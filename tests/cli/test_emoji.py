"""From the bundled emoji to a model that is sampled from, in the way ``benchmarks.emoji`` goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sag_dit
from benchmarks.emoji import Run, clock
from benchmarks.emoji_autoencoder import (
    TINY,
    build,
    loss_of,
    psnr,
    rate,
    reconstruct,
    scaling_factor,
    train,
)
from sag_dit.cli import encode
from sag_dit.cli.app import launch
from sag_dit.codec import VAECodec
from sag_dit.data.emoji import all_emoji, emoji, write_images

SMALL = (
    *("model.hidden_size=32", "model.depth=2", "model.num_heads=2", "data.batch_size=8"),
    *("data.workers=0", "max_steps=2", "every_n_steps.preview=9", "trainer.accelerator=cpu"),
    *("trainer.devices=1", "schedule.num_warmup_steps=1"),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_latents_of_the_emoji_train_a_model_that_draws(
    in_process: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae = build(TINY, 1).eval()
    vae.register_to_config(scaling_factor=0.5)
    vae.half().save_pretrained(tmp_path / "autoencoder")
    for split in ("train", "tune"):
        write_images(tmp_path / split, split, 1)  # type: ignore[arg-type]
        settings = [f"data.root={tmp_path / split}", f"out={tmp_path / 'latents' / split}"]
        settings += [f"vae={tmp_path / 'autoencoder'}", "data.size=64", "flip=false", "workers=0"]
        launch(
            "encode", encode.run_encode, [*settings, "trainer.accelerator=cpu", "trainer.devices=1"]
        )
    latents = [f"data.root={tmp_path / 'latents' / 'train'}"]
    latents += [f"data.validation={tmp_path / 'latents' / 'tune'}"]
    outcome = in_process("train", "experiment=emoji", *latents, *SMALL, "out=run")
    assert outcome.code == 0, outcome.err
    config = json.loads(Path("run/config.json").read_text())
    assert tuple(config["class_names"]) == all_emoji().class_names
    assert config["model"]["input_size"] in (16, [16, 16]) and config["kind"] == "v"
    whole = sag_dit.load("run")
    run = Run(tmp_path / "out", tmp_path, tiny=True)
    halves = sag_dit.load(run.export(Path("run"), "denoiser"), vae=str(tmp_path / "autoencoder"))
    for (name, left), right in zip(
        whole.denoiser.state_dict().items(), halves.denoiser.state_dict().values(), strict=True
    ):
        assert right.dtype == torch.float32
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6, msg=name)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"denoiser.tar", "report.json"}
    images = sag_dit.sample(halves, ["flag", "happy face"], steps=2)
    assert images.shape == (2, 3, 64, 64)


def test_the_autoencoder_learns() -> None:
    torch.manual_seed(0)
    pixels = emoji("tune")[0][:8]
    vae = build(TINY, 1).train()
    before = psnr(reconstruct(vae, pixels), pixels)[0]
    assert train(vae, pixels, 4, 5e-3, 1.0, steps=40) == 40
    assert psnr(reconstruct(vae, pixels), pixels)[0] > before + 3
    factor = scaling_factor(vae.eval(), pixels)
    vae.register_to_config(scaling_factor=factor)
    mean, std = VAECodec(vae, slice_size=8).posterior(pixels)
    variance = mean.var() + std.square().mean()
    assert float(variance) == pytest.approx(1, abs=0.1)


def test_the_loss_of_the_autoencoder_is_what_its_docstring_says() -> None:
    torch.manual_seed(0)
    vae = build(TINY, 1).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.manual_seed(1)
    loss = loss_of(vae, images).item()
    torch.manual_seed(1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        drawn = vae.decode(posterior.sample()).sample
    down = (drawn[..., 1:, :] - drawn[..., :-1, :]) - (images[..., 1:, :] - images[..., :-1, :])
    right = (drawn[..., 1:] - drawn[..., :-1]) - (images[..., 1:] - images[..., :-1])
    l1 = (drawn - images).abs().mean() + down.abs().mean() + right.abs().mean()
    kl = posterior.kl().mean() / (4 * 16 * 16)
    assert loss == pytest.approx(float(l1 + 1e-3 * kl), rel=1e-5)


def test_psnr_of_a_known_error() -> None:
    real = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    drawn = real.clone()
    drawn[0], drawn[1] = 1, 10
    mean, of_mean = psnr(drawn, real)
    assert mean == pytest.approx((48.1308 + 28.1308) / 2, abs=1e-3)
    assert of_mean == pytest.approx(48.1308 - 17.0329, abs=1e-3)  # a mean square of 50.5


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [rate(i / 200) for i in range(201)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(1) and top == 10 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_time_is_written_as_lightning_reads_it() -> None:
    assert [clock(each) for each in (0, 59.6, 3725)] == [
        "00:00:00:01",
        "00:00:01:00",
        "00:01:02:05",
    ]
