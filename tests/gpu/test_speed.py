"""The three speeds as ``sample.py`` draws with them, and a batch that a GPU has no memory for."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sag_dit.cli.composing import compose
from sag_dit.cli.sample import run_sample
from sag_dit.guidance import CFG, PAG
from sag_dit.sampling import Settings
from sag_dit.training.fitting import ask_once, fits, largest_batch, too_large
from tests.gpu.conftest import Stated
from tests.gpu.making import differences, random_model

pytestmark = pytest.mark.gpu


def drawn(device: str, out: Path, speed: str) -> tuple[Tensor, float]:
    """Draw bundled patches in this process; return the images and the seconds it took."""
    model = ["ckpt=patches", "sag_scale=1", "cfg_scale=1.5", "guidance.cfg.interval=[0.5,1]"]
    where = [f"trainer.accelerator={device}", "trainer.devices=1", f"out={out / speed}"]
    how = ["steps=10", "num_images=4", "batch_size=4", "gallery.num=0", f"speed={speed}"]
    start = time.perf_counter()
    run_sample(compose("sample", [*model, *where, *how]))
    seconds = time.perf_counter() - start
    files = sorted((out / speed / "images").glob("*.png"))
    assert len(files) == 4
    return torch.stack([torch.from_numpy(np.array(Image.open(each))) for each in files]), seconds


def test_speeds_draw_nearly_the_same(device: str, stated: Stated, tmp_path: Path) -> None:
    exact, seconds = drawn(device, tmp_path, "exact")
    stated("speed=exact: seconds of 4 small images", seconds)
    for speed in ("fast", "fastest"):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        images, seconds = drawn(device, tmp_path, speed)
        greatest, mean = differences(images, exact)
        assert greatest > 0
        stated(f"speed={speed}: mean difference in pixel values from exact", mean, 4)
        stated(f"speed={speed}: seconds of 4 small images", seconds)
        graphs = counters["stats"]["unique_graphs"]
        stated(f"speed={speed}: graphs compiled", graphs, 1 if speed == "fastest" else 0)


def test_what_fits_is_found_on_the_device(device: str, stated: Stated) -> None:
    if device != "cuda":
        pytest.skip("torch bounds the memory of CUDA devices only")
    model = random_model(device)
    how = Settings(steps=4, batch_size=4096, guidance=(CFG(1.5), PAG(1.0)))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / total))
    try:
        sentence = too_large(model, how)
        advice = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+) does", sentence)}
        assert advice and "\n" not in sentence, sentence
        assert fits(lambda: ask_once(model, replace(how, **advice)))
        size = largest_batch(model, how, 4096)
        stated("batch_size=auto in 1.5 GB: images of 16 x 16", size)
        assert 1 < size < 4096
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
