"""Images drawn on a GPU: against the CPU, beside neighbours, and compiled."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from sag_dit.guidance import CFG, SAG
from sag_dit.sampling import Settings, draw
from tests.gpu.conftest import Stated
from tests.gpu.making import differences, last_x, random_model, requests

pytestmark = pytest.mark.gpu

SETTINGS = Settings(
    steps=5,
    batch_size=4,
    # So low a threshold keeps SAG's mask from flipping where rounding differs.
    guidance=(SAG(scale=1.0, threshold=-1.0), CFG(scale=1.5)),
)
INTERVALS = replace(
    SETTINGS,
    steps=10,
    guidance=(
        SAG(scale=1.0, threshold=-1.0, interval=(0.2, 0.8)),
        CFG(scale=1.5, interval=(0.4, 1.0)),
    ),
)
"""The base alone, with SAG, with both and with CFG: batches of one and of two times the images."""


def test_images_agree_with_the_cpu(device: str, stated: Stated) -> None:
    here = draw(random_model(device), requests(4), SETTINGS)
    there = draw(random_model("cpu"), requests(4), SETTINGS)
    stated("images of the CPU: greatest difference in pixel values", differences(here, there)[0], 2)


def test_neighbours_and_padding_do_not_change_an_image(device: str) -> None:
    alone = draw(random_model(device), requests(1), SETTINGS)
    together = draw(random_model(device), requests(4), SETTINGS)
    assert torch.equal(alone[0], together[0])


def test_compiled_blocks_give_the_same_images(device: str, stated: Stated) -> None:
    """With SAG, CFG and intervals, where batches differ in size and the layer read runs eagerly."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = random_model(device), random_model(device)
    compiled.denoiser.compile_blocks()
    expected = last_x(eager, requests(4), INTERVALS)

    start = time.perf_counter()
    drawn = last_x(compiled, requests(4), INTERVALS)
    stated(
        "compiled: seconds of the first batch, compilation included", time.perf_counter() - start
    )
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    stated("compiled: greatest difference in x_0 from eager", differences(drawn, expected)[0], 2e-4)
    pixels = [model.codec.decode(x) for model, x in ((eager, expected), (compiled, drawn))]
    stated("compiled: greatest difference in pixel values from eager", differences(*pixels)[0], 1)

    start = time.perf_counter()
    again = last_x(compiled, requests(3), INTERVALS)[:3]
    stated("compiled: seconds of a later batch", time.perf_counter() - start)
    # Shapes seen again may be served by the code that was compiled for any shape.
    repeated = differences(again, drawn[:3])[0]
    stated("compiled: greatest difference in x_0 of a later batch from the first", repeated, 2e-4)
    graphs = counters["stats"]["unique_graphs"]
    last_x(compiled, requests(3), replace(INTERVALS, batch_size=3))
    last_x(compiled, requests(5), replace(INTERVALS, batch_size=5))
    stated("compiled: recompilations for batches of 4 and 8 rows", graphs - 1, 0)
    more = counters["stats"]["unique_graphs"] - graphs
    stated("compiled: further recompilations for batches of 3, 6, 5 and 10 rows", more, 0)


def test_capture_adds_little_memory(device: str, stated: Stated) -> None:
    if device != "cuda":
        pytest.skip("torch counts the memory of CUDA devices only")
    model = random_model(device)
    peaks = []
    for guidance in ((), (SAG(scale=1.0),)):
        torch.cuda.reset_peak_memory_stats()
        draw(model, requests(4), replace(SETTINGS, guidance=guidance))
        peaks.append(torch.cuda.max_memory_allocated())
    stated("peak memory with SAG / without", peaks[1] / peaks[0], 1.25)
