"""Presets of ``configs/guidance``: the layers they name in networks of the published structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sag_dit.cli.composing import compose
from sag_dit.cli.values import make_terms
from sag_dit.denoiser.text_conditional import TextConditional, TokenGrid, layout_of
from sag_dit.process import DDPM, Flow
from tests.pipelines import tiny

MIDDLE = "mid_block.attentions.0.transformer_blocks"


def xl() -> nn.Module:
    """Stable Diffusion XL's UNet with its 70 self-attention layers, narrow and without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network: nn.Module = UNet2DConditionModel(
            block_out_channels=(4, 4, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=1,
            norm_num_groups=1,
            cross_attention_dim=4,
            transformer_layers_per_block=(1, 2, 10),
        )
    return network


def sd3() -> nn.Module:
    """A network of as many joint blocks as Stable Diffusion 3.5 medium, narrow, without weights."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network: nn.Module = SD3Transformer2DModel(
            sample_size=8,
            num_layers=24,
            attention_head_dim=4,
            num_attention_heads=1,
            joint_attention_dim=4,
            caption_projection_dim=4,
            pooled_projection_dim=4,
        )
    return network


def pixart() -> nn.Module:
    """A network of as many blocks as PixArt-Sigma, narrow and without weights."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        network: nn.Module = PixArtTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=4,
            num_layers=28,
            cross_attention_dim=4,
            caption_channels=4,
            sample_size=128,
        )
    return network


def denoiser_of(network: Any, kind: str) -> TextConditional:
    process = Flow(1000) if kind == "v" else DDPM("scaled_linear")
    grid = TokenGrid((128, 128))
    return layout_of(network)(network, process, kind, grid, torch.float32, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "network", "kind", "expected"),
    [
        (
            "stable_diffusion",
            tiny.unet,
            "eps",
            {"sag": f"{MIDDLE}.0.attn1", "pag": [f"{MIDDLE}.0.attn1"]},
        ),
        (
            "stable_diffusion_xl",
            xl,
            "eps",
            {
                "sag": f"{MIDDLE}.0.attn1",
                "pag": [f"{MIDDLE}.{i}.attn1" for i in range(10)],
                "seg": [f"{MIDDLE}.{i}.attn1" for i in range(10)],
                "tpg": [
                    f"down_blocks.2.attentions.{i // 10}.transformer_blocks.{i % 10}.attn1"
                    for i in range(2, 20)
                ],
            },
        ),
        ("pixart", pixart, "eps", {"pag": ["transformer_blocks.14.attn1"]}),
        (
            "stable_diffusion_3",
            sd3,
            "v",
            {
                "pag": ["transformer_blocks.13.attn"],
                "slg": [f"transformer_blocks.{i}.attn" for i in (7, 8, 9)],
            },
        ),
    ],
)
def test_presets_name_the_published_layers(
    preset: str, network: Any, kind: str, expected: dict[str, Any]
) -> None:
    terms = make_terms(compose("sample", [f"guidance={preset}"]).guidance)
    denoiser = denoiser_of(network(), kind)
    for name, layers in expected.items():
        said = terms[name].identity(denoiser)
        assert said["layer" if name == "sag" else "layers"] == layers
