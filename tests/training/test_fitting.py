"""What fits a device's memory, on a CPU whose networks refuse more rows than they are told."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.codec import VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.sampling import Drawn, Request, Settings
from sag_dit.training.fitting import (
    ask_once,
    decoding_fits,
    largest_batch,
    out_of_memory,
    too_large,
)
from sag_dit.training.predicting import Predictor
from tests.conftest import MakeDiT
from tests.test_codec import small_vae

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Small(DiT):
    """Has room for so many rows at once."""

    room = 8
    asked: list[int]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.asked.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError(FULL)
        return super().forward(x, t, y)


@pytest.fixture
def model(make_dit: MakeDiT) -> Model:
    network = make_dit(in_channels=3)
    network.__class__ = Small
    network.asked = []
    return from_denoiser(ClassConditional(network, DDPM()).eval(), "small")


LATE = (CFG(1.5, interval=(0.5, 1.0)), SAG(1.0, interval=(0.0, 0.7)))
"""Two rows at first, then four (one after the other), then two at once."""


def requests(count: int) -> list[Request]:
    return [Request(i, 0, i % 10, stream=i) for i in range(count)]


@pytest.mark.parametrize(
    ("size", "guidance", "max_rows", "told"),
    [
        (4, (CFG(1.5), PAG(1.0)), None, r"batch_size=4 .*\(12 rows at once\): max_rows=8 does"),
        (8, (CFG(1.5),), None, r"batch_size=8 .*\(16 rows at once\): max_rows=8 does"),
        (8, LATE, None, r"batch_size=8 .*\(16 rows at once\): max_rows=8 does"),
        (16, (), None, r"batch_size=16 does not fit the memory of cpu: batch_size=8 does"),
        (32, LATE, 32, r"batch_size=32 .*: batch_size=4 does"),
        (5, (), None, r"although it does by itself"),
    ],
)
def test_what_fits_is_told_in_a_sentence(
    model: Model, size: int, guidance: Any, max_rows: int | None, told: str
) -> None:
    how = Settings(steps=4, guidance=guidance, batch_size=size, max_rows=max_rows)
    sentence = too_large(model, how)
    assert re.search(told, sentence) and "\n" not in sentence
    # What is told is true.
    advice = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+) does", sentence)}
    if "by itself" not in sentence:
        ask_once(model, replace(how, **advice))
        with pytest.raises(torch.OutOfMemoryError):
            ask_once(model, how)


def test_a_run_is_asked_once_for_each_set_of_active_terms(model: Model) -> None:
    network: Any = model.denoiser.network
    network.asked.clear()
    ask_once(model, Settings(steps=10, guidance=LATE, batch_size=2))
    # SAG alone, both, CFG alone.
    assert network.asked == [2, 2, 4, 2, 4]


@pytest.mark.parametrize(("guidance", "most", "size"), [((), 64, 8), (LATE, 64, 4), ((), 6, 4)])
def test_the_largest_batch_is_a_power_of_two(
    model: Model, guidance: Any, most: int, size: int
) -> None:
    assert largest_batch(model, Settings(steps=4, guidance=guidance), most) == size


def test_not_even_one_image_fits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "room", 0)
    with pytest.raises(ValueError, match=r"batch_size=1 .* nor does one image: expected a device"):
        largest_batch(model, Settings(steps=2), most=8)


def test_latents_that_are_too_many_to_decode(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae()
    decode = vae.decode

    def narrow(self: Any, z: Tensor) -> Any:
        if len(z) > 3:
            raise torch.OutOfMemoryError(FULL)
        return decode(z)

    monkeypatch.setattr(type(vae), "decode", narrow)
    codec = VAECodec(vae, slice_size=8)
    model = from_denoiser(ClassConditional(make_dit(), DDPM()).eval(), "latent", codec=codec)
    how = Settings(steps=2, batch_size=8)
    assert not decoding_fits(model, how)
    assert (
        "decoding 8 images at once does not fit the memory of cpu: decoding.batch_size=2 does"
        in (too_large(model, how))
    )


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError(FULL), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_full(error: Exception, full: bool) -> None:
    assert out_of_memory(error) is full


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_drawing_tells_what_fits_before_the_first_image(
    model: Model, tmp_path: Path, precision: str
) -> None:
    """On the ranks of a Trainer, also where CFG turns on late in the run."""
    make = partial(Trainer, accelerator="cpu", devices=1, precision=precision)
    taken: list[Drawn] = []
    how = Settings(steps=6, guidance=LATE, batch_size=6)
    with pytest.raises(ValueError, match=r"12 rows at once\): max_rows=6 does") as told:
        Predictor(make, tmp_path).draw(model, requests(6), how, [taken.append])
    assert not taken and told.value.__cause__ is None
    fewer = replace(how, max_rows=6)
    Predictor(make, tmp_path).draw(model, requests(6), fewer, [taken.append])
    assert len(taken) == 1
