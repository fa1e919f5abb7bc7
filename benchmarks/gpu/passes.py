"""DiT-XL/2 at 256 x 256: a pass in each arithmetic, what capture adds, and images end to end."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters

from benchmarks.measure import flops, median_seconds, ratio, synchronised
from benchmarks.rows import Rows
from benchmarks.sizes import (
    ARITHMETICS,
    DEVICE,
    GUIDANCE,
    Scale,
    arithmetic,
    autoencoder,
    inputs,
    model,
    network,
    share_of_peak,
)
from sag_dit.attention import Capture
from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import Term
from sag_dit.models import DiT
from sag_dit.output.folder import SampleFolder, pixels, write_png
from sag_dit.process import DDPM
from sag_dit.sampling import Settings
from sag_dit.training.predicting import Predictor


def products(scale: Scale, rows: Rows) -> None:
    """Measure what the device's own matrix product reaches: the ceiling of all that follows."""
    n = scale.product
    for name in ARITHMETICS[:3]:
        with arithmetic(name) as dtype:
            a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
            took = median_seconds(partial(torch.mm, a, b), scale.rounds)
        rate = 2 * n**3 / took / 1e12
        note = share_of_peak(2 * n**3, took, name).replace("MFU", "of the data sheet:")
        rows.add(f"matrix product, {n} x {n}", name, rate, "TFLOP/s", note)


def one_pass(made: DiT, latent: int, batch: int, name: str, rounds: int) -> tuple[float, str]:
    """Return the seconds of one pass and its MFU."""
    asked = inputs(latent, batch, next(made.parameters()).dtype)
    took = median_seconds(partial(made, *asked), rounds)
    return took, share_of_peak(flops_of(made, latent) * batch, took, name)


def flops_of(made: DiT, latent: int) -> int:
    """Return the operations of one image's pass, counted on a copy that is not compiled."""
    size = {"depth": len(made.blocks), "hidden_size": made.pos_embed.shape[-1]}
    with torch.device("meta"):
        copy = DiT(latent, num_heads=made.blocks[0].attn.num_heads, patch_size=2, **size)
        x, zero = torch.empty(1, 4, latent, latent), torch.zeros(1, dtype=torch.long)
        return flops(partial(copy, x, zero, zero))


def captured(made: DiT, latent: int, batch: int, rounds: int) -> tuple[float, float, float]:
    """Return the ratio of a pass that reads one layer to a plain one: median and quartiles."""
    denoiser = ClassConditional(made, DDPM()).eval()
    x, _, y = inputs(latent, batch, torch.float32)
    asked = (x, denoiser.process.level(500), y)
    reading = partial(denoiser, *asked, [Capture(denoiser.layer("auto"))])
    return ratio(reading, partial(denoiser, *asked), rounds)


class Clock(Callback):
    """Takes the time from the first request to the last file, without moving weights about."""

    seconds = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start when the weights are on the device."""
        self._start = synchronised()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop when all is written."""
        self.seconds = synchronised() - self._start


class Drawing:
    """A run of ``sample.py`` without its start: a Trainer that draws, decodes and writes PNGs."""

    def __init__(self, made: Model, scale: Scale, precision: str) -> None:
        self._model, self._scale, self._precision = made, scale, precision

    def __call__(self, guidance: tuple[Term, ...]) -> float:
        """Draw one batch into a new folder and return the seconds it took."""
        scale, clock = self._scale, Clock()
        settings = Settings(steps=scale.steps, batch_size=scale.batch, guidance=guidance)
        pending = make_requests(scale.batch, 0, None, self._model.class_names)
        with tempfile.TemporaryDirectory() as place:
            folder = SampleFolder(Path(place))
            folder.claim({}, {})
            make = partial(
                Trainer,
                accelerator="auto",
                devices=1,
                precision=self._precision,  # type: ignore[arg-type]
            )
            predictor = Predictor(make, folder.path, [clock])
            predictor.draw(self._model, pending, settings, [folder.write])
            written = len(list((Path(place) / "images").glob("*.png")))
        if written != scale.batch:
            raise RuntimeError(f"{written} of {scale.batch} images were written")
        return clock.seconds


def drawing(made: DiT, vae: Any, scale: Scale, name: str, rows: Rows) -> None:
    """Measure images a second end to end, beside as many bare passes as unguided steps."""
    if name == "fp32":
        # Ten times slower than bf16: a smaller batch fills the device as well.
        scale = replace(scale, batch=scale.batches[0])
    asked = inputs(scale.latent, scale.batch, next(made.parameters()).dtype)
    with torch.no_grad():
        bare = scale.steps * median_seconds(partial(made, *asked), scale.rounds)
    precision = "bf16-true" if name.startswith("bf16") else "32-true"
    draw = Drawing(model(made, vae), scale, precision)
    counters.clear()
    draw(GUIDANCE["CFG + SAG"])
    for label, guidance in GUIDANCE.items():
        took = draw(guidance)
        beside = f"{took / bare:.2f} x {scale.steps} bare passes"
        what = f"drawing, {scale.steps} steps, decoded and written: {label}"
        rows.add(what, f"{name}, batch {scale.batch}", scale.batch / took, "images/s", beside)
    if "compile" in name:
        graphs = counters["stats"]["unique_graphs"]
        rows.add("drawing: graphs compiled for all of these", name, float(graphs))


def finishing(scale: Scale, vae: Any, rows: Rows) -> None:
    """Measure decoding and PNG writing by themselves, and decoding in bf16 and in batches."""
    side = scale.latent
    for name, dtype, size in (
        ("float32, one at a time (as sag_dit does)", torch.float32, 1),
        ("float32, TF32, batch", torch.float32, scale.large_batch),
        ("bf16, batch", torch.bfloat16, scale.large_batch),
    ):
        vae = vae.to(dtype)
        z = torch.randn(size, 4, side, side, device=DEVICE, dtype=dtype)
        with arithmetic("fp32" if size == 1 else "TF32"), torch.no_grad():
            took = median_seconds(lambda z=z, vae=vae: vae.decode(z).sample, scale.rounds)
        rows.add("decoding", f"{name}, batch {size}", 1e3 * took / size, "ms an image")
    vae.to(torch.float32)
    image = pixels(torch.randint(0, 256, (3, 8 * side, 8 * side), dtype=torch.uint8))
    with tempfile.TemporaryDirectory() as place:
        took = median_seconds(partial(write_png, Path(place) / "image.png", image), scale.rounds)
    rows.add("writing a PNG of noise", f"{8 * side} x {8 * side}", 1e3 * took, "ms an image")


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Measure all of it, what is most wanted first."""
    with torch.no_grad():
        with rows.attempt("matrix product"):
            products(scale, rows)
        vae = autoencoder(scale)
        with rows.attempt("decoding and writing"):
            finishing(scale, vae, rows)
        for name in ("bf16", "bf16 + compile", "TF32", "fp32"):
            made = network(scale.network, scale.latent)
            if name == "bf16":
                with rows.attempt("a pass", "bf16-mixed"):
                    mixed(made, scale, rows)
            if "compile" in name:
                made.compile_blocks()
            with arithmetic(name) as dtype:
                made = made.to(dtype)
                with rows.attempt("a pass", name):
                    for batch in scale.batches:
                        took, share = one_pass(made, scale.latent, batch, name, scale.rounds)
                        rows.add("a pass", f"{name}, batch {batch}", 1e3 * took, "ms", share)
                what = "a pass that captures one layer / a plain one"
                with rows.attempt(what, name):
                    median, low, high = captured(made, scale.latent, scale.batch, scale.rounds)
                    note = f"{low:.3f} to {high:.3f}"
                    rows.add(what, f"{name}, batch {scale.batch}", median, "", note)
                with rows.attempt("drawing", name):
                    drawing(made, vae, scale, name, rows)


def mixed(made: DiT, scale: Scale, rows: Rows) -> None:
    """Measure a pass under autocast, as ``trainer.precision=bf16-mixed`` runs it."""
    with torch.autocast(DEVICE, torch.bfloat16):
        took, share = one_pass(made, scale.latent, scale.batch, "bf16-mixed", scale.rounds)
    rows.add("a pass", f"bf16-mixed (autocast), batch {scale.batch}", 1e3 * took, "ms", share)
