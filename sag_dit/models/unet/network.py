"""UNet: the network of ADM and IDDPM, on diffusers' UNet2DModel, built from their own flags.

The arithmetic is that of openai/guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233) and
openai/improved-diffusion (Nichol & Dhariwal 2021, arXiv 2102.09672); parameters have diffusers'
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from diffusers.models import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float, Int
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer
from sag_dit.bounds import Bounds, Count, Share
from sag_dit.models.network import drop_labels
from sag_dit.models.unet.parts import GROUPS, Shape, decoder_parts, encoder_parts, pair
from sag_dit.tensors import Images, Labels


def split_heads(network: nn.Module, num_heads: int | None) -> None:
    """Give every attention of a network the same number of heads, where a number is stated."""
    if num_heads is None:
        return
    for module in network.modules():
        if isinstance(module, Attention):
            module.heads = num_heads


def block_type(direction: Literal["Down", "Up"], attends: bool, resblock_updown: bool) -> str:
    """Return diffusers' name of a level's class."""
    if attends:
        return f"Attn{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if resblock_updown else f"{direction}Block2D"


def time_embedding(model_channels: int) -> tuple[nn.Module, nn.Module]:
    """Return sinusoids (cosines first, exponents over half) and the SiLU network behind them.

    Their width follows ``model_channels`` also where the first level is narrower, as in ADM-512.
    """
    sinusoids = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    return sinusoids, TimestepEmbedding(model_channels, 4 * model_channels)


class UNet(UNet2DModel):  # type: ignore[misc]  # diffusers' classes are untyped
    """UNet of ADM and IDDPM: (x, t, y) -> eps, and with ``learn_sigma`` as many channels again.

    The arguments are the published flags, ``model_channels`` being num_channels.
    ``attention_resolutions`` are heights of feature maps. ``num_classes`` 0 is an unconditional
    model, which does not look at y. With ``class_dropout_prob``, which no published model has, row
    ``num_classes`` of the label table means 'no class'. The network is told t ``time_scale``:
    IDDPM's rescaled times are those of 1,000 steps, so 0.25 at 4,000.

    Raises:
        ValueError: sizes that do not fit each other, or not exactly one of ``num_heads`` and
            ``num_head_channels``.

    Example:
        >>> import torch
        >>> network = UNet(16, 3, 32, 1, (1, 2), (8,), num_heads=4, learn_sigma=False)
        >>> network(torch.zeros(1, 3, 16, 16), torch.tensor([500]), torch.tensor([0])).shape
        torch.Size([1, 3, 16, 16])
    """

    key = "unet"
    former = ("sag_dit.models.unet.UNet",)
    any_size = True
    """It is made of convolutions, and its attention knows no positions."""

    def __init__(
        self,
        input_size: Count | tuple[Count, Count] = 64,
        in_channels: Count = 3,
        model_channels: Count = 128,
        num_res_blocks: Count = 2,
        channel_mult: Sequence[Annotated[float, Bounds(least=0, most=1000)]] = (1, 2, 3, 4),
        attention_resolutions: Sequence[Count] = (16, 8),
        num_heads: Count | None = None,
        num_head_channels: Count | None = None,
        scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        num_classes: Annotated[int, Bounds(least=0, most=2**31)] = 0,
        class_dropout_prob: Share = 0.0,
        learn_sigma: bool = True,
        dropout: Share = 0.0,
        time_scale: float = 1.0,
    ) -> None:
        # Sizes of the levels, checked.
        shape = Shape(
            pair(input_size),
            model_channels,
            tuple(channel_mult),
            tuple(attention_resolutions),
            num_heads,
            num_head_channels,
        )
        # The network as diffusers builds it from such sizes.
        levels = len(shape.widths)
        resampling = "resnet" if resblock_updown else "conv"
        super().__init__(
            sample_size=shape.size,
            in_channels=in_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            time_embedding_dim=4 * model_channels,
            down_block_types=tuple(block_type("Down", a, resblock_updown) for a in shape.attending),
            up_block_types=tuple(
                block_type("Up", a, resblock_updown) for a in reversed(shape.attending)
            ),
            block_out_channels=shape.widths,
            layers_per_block=num_res_blocks,
            downsample_type=resampling,
            upsample_type=resampling,
            dropout=dropout,
            attention_head_dim=num_head_channels,
            norm_num_groups=GROUPS,
            attn_norm_num_groups=GROUPS,
            resnet_time_scale_shift="scale_shift" if scale_shift_norm else "default",
            num_class_embeds=num_classes + (class_dropout_prob > 0) if num_classes else None,
        )
        # Where diffusers cannot say what was published: the heads, and the width of the time.
        split_heads(self, num_heads)
        self.time_proj, self.time_embedding = time_embedding(model_channels)
        # What all else asks of a network.
        self.arguments: dict[str, Any] = {
            "input_size": shape.size[0] if shape.size[0] == shape.size[1] else list(shape.size),
            "in_channels": in_channels,
            "model_channels": model_channels,
            "num_res_blocks": num_res_blocks,
            "channel_mult": list(shape.channel_mult),
            "attention_resolutions": list(shape.attention_resolutions),
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "scale_shift_norm": scale_shift_norm,
            "resblock_updown": resblock_updown,
            "num_classes": num_classes,
            "class_dropout_prob": class_dropout_prob,
            "learn_sigma": learn_sigma,
            "dropout": dropout,
            "time_scale": time_scale,
        }
        """What builds this network anew, as plain values."""
        self.input_size = shape.size
        self.patch_size = 2 ** (levels - 1)
        """What both sides of the input have to be multiples of."""
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.time_scale = time_scale
        parts = (levels, num_res_blocks, shape.attending)
        attentions = [
            part
            for part in (*encoder_parts(*parts), *decoder_parts(*parts))
            if part.kind == "attention"
        ]
        self.layers = {
            part.name: AttentionLayer(part.name, shape.grids[part.level]) for part in attentions
        }
        """Its self-attention layers by name."""
        self.aliases = {part.published.rsplit(".", 1)[0]: part.name for part in attentions}
        """Names of the published code, such as output_blocks.2, and ours."""
        self.aliases["auto"] = "mid_block.attentions.0"
        self._initialise()

    def _initialise(self) -> None:
        """Zero what closes each residual branch and the network, as published."""
        for name, parameter in self.named_parameters():
            if name.rsplit(".", 1)[0].endswith(("conv2", "to_out.0", "conv_out")):
                nn.init.zeros_(parameter)

    @property
    def blocks(self) -> nn.ModuleList:
        """Its blocks in the order of their evaluation, to shard or compile each by itself."""
        return nn.ModuleList([*self.down_blocks, self.mid_block, *self.up_blocks])

    @property
    def class_embedder(self) -> str:
        """The module that embeds the classes."""
        return "class_embedding"

    @property
    def null_label(self) -> int | None:
        """The label that means 'no class', None if the network was trained without."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def checkpoint_blocks(self) -> bool:
        """Whether the backward pass computes each block anew instead of keeping activations."""
        return bool(self.is_gradient_checkpointing)

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, wanted: bool) -> None:
        (self.enable_gradient_checkpointing if wanted else self.disable_gradient_checkpointing)()

    def forward(self, x: Images, t: Float[Tensor, "b"] | Int[Tensor, "b"], y: Labels) -> Images:
        """Denoise images x at times t for classes y."""
        labels = y if self.num_classes else None
        if labels is not None and self.training and self.class_dropout_prob > 0:
            labels = drop_labels(labels, self.num_classes, self.class_dropout_prob)
        scaled = t.float() * self.time_scale
        out: Tensor = super().forward(x, scaled, class_labels=labels, return_dict=False)[0]
        return out

    def compile_blocks(self) -> None:
        """Compile every block by itself, in place; parameter names stay as they are."""
        for block in self.blocks:
            block.compile()
