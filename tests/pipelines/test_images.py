"""Image-to-image and inpainting pipelines: another start, and channels behind x_t."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sag_dit.guidance import PAG, SAG, SWG
from sag_dit.pipelines import guide
from tests.pipelines import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
HEIGHT, WIDTH = 16, 24
NOISE = np.random.default_rng(0)
PICTURE = Image.fromarray(NOISE.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
HOLE = Image.fromarray((NOISE.random((HEIGHT, WIDTH)) > 0.5).astype(np.uint8) * 255)
SIZE = {"height": HEIGHT, "width": WIDTH}
CHANGE = {"image": PICTURE, "strength": 0.6}
FILL = {"image": PICTURE, "mask_image": HOLE, **SIZE}
SHORT = {"max_sequence_length": tiny.TOKENS}
# One of each layout, and of each way to give the picture, in the fast set.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd, image": (lambda: tiny.sd(diffusers.StableDiffusionImg2ImgPipeline), CHANGE),
    "sd, 9 channels": (lambda: tiny.sd(diffusers.StableDiffusionInpaintPipeline, 9), FILL),
    "sd3, image": (
        lambda: tiny.sd3(diffusers.StableDiffusion3Img2ImgPipeline),
        {**CHANGE, **SIZE, **SHORT},
    ),
    "flux, fill": (lambda: tiny.flux(diffusers.FluxFillPipeline, fill=True), {**FILL, **SHORT}),
}
SLOW: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd, hole": (lambda: tiny.sd(diffusers.StableDiffusionInpaintPipeline), FILL),
    "sdxl, image": (lambda: tiny.sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), CHANGE),
    "sdxl, hole": (
        lambda: tiny.sdxl(diffusers.StableDiffusionXLInpaintPipeline),
        {**FILL, "strength": 0.7},
    ),
    "sd3, hole": (
        lambda: tiny.sd3(diffusers.StableDiffusion3InpaintPipeline),
        {**FILL, **SHORT},
    ),
    "flux, image": (
        lambda: tiny.flux(diffusers.FluxImg2ImgPipeline),
        {**CHANGE, **SIZE, **SHORT},
    ),
    "flux, hole": (lambda: tiny.flux(diffusers.FluxInpaintPipeline), {**FILL, **SHORT}),
}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_pictures_are_changed_and_filled(case: str) -> None:
    build, call = (CASES | SLOW)[case]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "latent"}
        latents: Tensor = pipe("a corgi", **{**options, **call}).images
        return latents

    plain = draw()
    with guide(pipe):
        assert torch.equal(draw(), plain)
    with guide(pipe, SAG(0.5), PAG(1.0)):
        changed = draw()
    assert changed.isfinite().all()
    assert float((changed - plain).abs().mean()) > 1e-2 * float(plain.abs().mean())
    assert torch.equal(draw(), plain)


def test_crops_of_an_image_with_a_mask_are_refused() -> None:
    build, call = CASES["sd, 9 channels"]
    pipe = build()
    with guide(pipe, SWG(0.5)), pytest.raises(ValueError, match="guide without SWG"):
        pipe("a corgi", num_inference_steps=2, output_type="latent", **call)
