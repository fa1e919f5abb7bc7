"""SAG and PAG against diffusers' own pipelines for them, of the same components."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sag_dit.guidance import PAG, SAG
from sag_dit.pipelines import guide
from tests.pipelines import tiny
from tests.pipelines.tiny import draw

# diffusers hands tensors to NumPy in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TOLERANCE = 1e-4


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def agree(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    """Agree to 1e-4 of the largest value, of which the guidance changes a hundred times as much."""
    size = float(theirs.abs().max())
    assert float((theirs - plain).abs().max()) > 100 * TOLERANCE * size
    assert float((ours - theirs).abs().max()) < TOLERANCE * size


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(("scale", "scheduler"), [(1.0, "ddim"), (5.0, "ddim"), (5.0, "pndm")])
def test_sag_is_that_of_diffusers(scale: float, scheduler: str) -> None:
    """In the middle block, kernel 9, sigma 1; sizes not square, several prompts and images each."""
    pipe = quiet(tiny.sd())
    if scheduler == "pndm":
        pipe.scheduler = diffusers.PNDMScheduler.from_config(
            pipe.scheduler.config, skip_prk_steps=True
        )
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs = diffusers.StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    call: dict[str, Any] = {
        "prompt": ["a corgi", "b"],
        "num_images_per_prompt": 2,
        "height": 16,
        "width": 24,
        "guidance_scale": scale,
    }
    plain = draw(pipe, "sd", **call)
    with guide(pipe, SAG(0.75)):
        ours = draw(pipe, "sd", **call)
    agree(ours, draw(quiet(theirs), "sd", sag_scale=0.75, **call), plain)


CASES = {
    "sd": (tiny.sd, diffusers.StableDiffusionPAGPipeline, "mid", "auto", ()),
    "pixart": (
        lambda: tiny.pixart(diffusers.PixArtSigmaPipeline),
        diffusers.PixArtSigmaPAGPipeline,
        "transformer_blocks.1",
        "transformer_blocks.1",
        (),
    ),
    # diffusers' processors for PAG pass by the norms and the second attention of 3.5.
    "sd3": (
        lambda: tiny.sd3(medium=False),
        diffusers.StableDiffusion3PAGPipeline,
        "transformer_blocks.1",
        1,
        ("image_encoder", "feature_extractor"),
    ),
}


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
@pytest.mark.parametrize("family", CASES)
def test_pag_is_that_of_diffusers(family: str, scale: float) -> None:
    build, made, their_layer, our_layer, missing = CASES[family]
    pipe = quiet(build())
    parts = {name: part for name, part in pipe.components.items() if name not in missing}
    if family == "sd":
        parts["requires_safety_checker"] = False
    theirs = quiet(made(**parts, pag_applied_layers=[their_layer]))
    call: dict[str, Any] = {"prompt": ["a corgi", "b"], "guidance_scale": scale}
    plain = draw(pipe, family, **call)
    with guide(pipe, PAG(2.0, layers=our_layer)):
        ours = draw(pipe, family, **call)
    agree(ours, draw(theirs, family, pag_scale=2.0, **call), plain)
