"""Classifier: ADM's classifier of noisy images, the UNet's encoder with an attention pool.

The arithmetic is that of openai/guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233, H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from jaxtyping import Float, Int
from timm.layers import AttentionPool2d
from torch import Tensor, nn

from sag_dit.bounds import Bounds, Count
from sag_dit.models.unet.network import block_type, time_embedding
from sag_dit.models.unet.parts import GROUPS, Shape, pair
from sag_dit.tensors import Images


class Classifier(nn.Module):
    """Classifies noisy images: (x_t, t) -> logits of ``num_classes`` classes.

    The arguments are the published flags, ``model_channels`` being classifier_width and
    ``num_res_blocks`` classifier_depth.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> import torch
        >>> classifier = Classifier(16, 3, 32, 1, (1, 2), (8,), num_head_channels=16, num_classes=5)
        >>> classifier(torch.zeros(1, 3, 16, 16), torch.tensor([500])).shape
        torch.Size([1, 5])
    """

    key = "adm_classifier"
    former = ("sag_dit.models.classifier.Classifier",)

    def __init__(
        self,
        input_size: Count | tuple[Count, Count] = 64,
        in_channels: Count = 3,
        model_channels: Count = 128,
        num_res_blocks: Count = 2,
        channel_mult: Sequence[Annotated[float, Bounds(least=0, most=1000)]] = (1, 2, 3, 4),
        attention_resolutions: Sequence[Count] = (32, 16, 8),
        num_head_channels: Count = 64,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        num_classes: Count = 1000,
    ) -> None:
        super().__init__()
        # Sizes of the levels, checked as a UNet's.
        shape = Shape(
            pair(input_size),
            model_channels,
            tuple(channel_mult),
            tuple(attention_resolutions),
            num_heads=None,
            num_head_channels=num_head_channels,
        )
        self.input_size = shape.size
        self.in_channels = in_channels
        self.num_classes = num_classes
        last = shape.widths[-1]
        common: dict[str, Any] = {
            "temb_channels": 4 * model_channels,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": GROUPS,
            "resnet_time_scale_shift": "scale_shift" if scale_shift_norm else "default",
            "attention_head_dim": num_head_channels,
        }
        # The encoder of such a UNet.
        self.time_proj, self.time_embedding = time_embedding(model_channels)
        self.conv_in = nn.Conv2d(in_channels, shape.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                block_type("Down", attends, resblock_updown),
                num_layers=num_res_blocks,
                in_channels=before,
                out_channels=width,
                add_downsample=level < len(shape.widths) - 1,
                downsample_padding=1,
                downsample_type="resnet" if resblock_updown else "conv",
                **common,
            )
            for level, (before, width, attends) in enumerate(
                zip((shape.widths[0], *shape.widths), shape.widths, shape.attending, strict=False)
            )
        )
        self.mid_block = UNetMidBlock2D(in_channels=last, attn_groups=GROUPS, **common)
        # Where a UNet would go up again, all places are pooled by attention.
        self.conv_norm_out = nn.GroupNorm(GROUPS, last)
        self.conv_act = nn.SiLU()
        self.pool = AttentionPool2d(
            last, shape.grids[-1], out_features=num_classes, head_dim=num_head_channels
        )

    def forward(self, x: Images, t: Float[Tensor, "b"] | Int[Tensor, "b"]) -> Float[Tensor, "b n"]:
        """Return the logits of images x at times t; n is ``num_classes``."""
        dtype = self.conv_in.weight.dtype
        embedded = self.time_embedding(self.time_proj(t).to(dtype))
        h = self.conv_in(x.to(dtype))
        for block in self.down_blocks:
            h, _ = block(h, embedded)
        h = self.mid_block(h, embedded)
        logits: Tensor = self.pool(self.conv_act(self.conv_norm_out(h)))
        return logits
