"""speed=exact, fast and fastest end to end: from the request to the file, at one batch."""

from __future__ import annotations

import torch

from benchmarks.gpu.passes import GUIDANCE, Drawing
from benchmarks.rows import Rows
from benchmarks.sizes import Scale, autoencoder, model, network
from sag_dit.cli.composing import compose
from sag_dit.cli.speed import in_arithmetic, network_precision, speed_told

SPEEDS = ("fast", "fastest", "exact")
"""What is most wanted first: exact takes longest."""


def images_a_second(scale: Scale, speed: str, rows: Rows) -> None:
    """Draw as ``sample.py`` does, in the arithmetic that it composes."""
    config = compose("sample", [f"speed={speed}"])
    made = in_arithmetic(model(network(scale.network, scale.latent), autoencoder(scale)), config)
    draw = Drawing(made, scale, network_precision(config))
    torch.set_float32_matmul_precision(config.matmul)
    draw(())  # Compiles, and finds the fastest convolutions.
    for label in ("unguided", "CFG", "CFG + SAG"):
        what = f"drawing, {scale.steps} steps, decoded and written: {label}"
        rate = scale.batch / draw(GUIDANCE[label])
        told = speed_told(config, made).removeprefix("speed: ")
        rows.add(what, f"speed={speed}, batch {scale.batch}", rate, "images/s", told)


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Measure each speed; one that fails leaves the others."""
    before = torch.get_float32_matmul_precision()
    for speed in SPEEDS:
        with rows.attempt("drawing", f"speed={speed}"):
            images_a_second(scale, speed, rows)
    torch.set_float32_matmul_precision(before)
