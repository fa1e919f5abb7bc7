"""What only a GPU can show. Skipped, and said so, where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sag_dit.checkpoints import Model
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = Settings(
    steps=5, batch_size=4, guidance=(SAG(scale=1.0, threshold=-1.0), CFG(scale=1.5))
)


def model(device: str) -> Model:
    """A small pixel model with random weights; ``threshold=-1`` keeps SAG's mask from flipping."""
    torch.manual_seed(0)
    network = DiT(16, 2, 3, 96, 4, 4, num_classes=10)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.02)
    denoiser = ClassConditional(network, DDPM(), x_0_range=(-1, 1)).to(device).eval()
    return Model(denoiser, IdentityCodec(), "small", "", {}, denoiser.class_names)


def requests(count: int) -> list[Request]:
    return [Request(i, 0, i % 10, i) for i in range(count)]


def test_images_agree_with_the_cpu() -> None:
    on_gpu = draw(model("cuda"), requests(4), SETTINGS).cpu().int()
    on_cpu = draw(model("cpu"), requests(4), SETTINGS).int()
    assert (on_gpu - on_cpu).abs().max() <= 2


def test_neighbours_and_padding_do_not_change_an_image() -> None:
    alone = draw(model("cuda"), requests(1), SETTINGS)
    together = draw(model("cuda"), requests(4), SETTINGS)
    assert torch.equal(alone[0], together[0])


def test_per_block_compile_gives_the_same_images() -> None:
    compiled = model("cuda")
    compiled.denoiser.network.compile_blocks()
    drawn = draw(compiled, requests(4), SETTINGS).cpu().int()
    eager = draw(model("cuda"), requests(4), SETTINGS).cpu().int()
    assert (drawn - eager).abs().max() <= 2


def test_capture_adds_little_memory() -> None:
    on_gpu = model("cuda")
    peaks = []
    for guidance in ((), (SAG(scale=1.0),)):
        torch.cuda.reset_peak_memory_stats()
        draw(on_gpu, requests(4), replace(SETTINGS, guidance=guidance))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.25 * peaks[0]
