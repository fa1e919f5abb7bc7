"""Where the image's tokens are in each of diffusers' networks that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sag_dit.attention import AttentionLayer
from sag_dit.denoiser.text_conditional import TextConditional, TokenGrid
from sag_dit.tensors import Images


class UNetText(TextConditional):
    """Stable Diffusion 1, 2 and XL: convolutions with transformers between, at several sizes.

    The grid halves, rounding up, with each downsampling. ``auto`` is the first self-attention of
    the middle block, SAG's published choice.

    Example::

        layers = list(UNetText.find_layers(pipe.unet, TokenGrid((64, 64))))
    """

    network_class = "UNet2DConditionModel"
    x_name = "sample"

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn1`` of every transformer block, downwards, in the middle, upwards."""
        unet: Any = network
        grids = [grid.size]
        for i, block in enumerate(unet.down_blocks):
            yield from _attn1(block, f"down_blocks.{i}", grids[-1])
            if block.downsamplers is not None:
                height, width = grids[-1]
                grids.append(((height + 1) // 2, (width + 1) // 2))
        if unet.mid_block is not None:
            yield from _attn1(unet.mid_block, "mid_block", grids[-1])
        for i, block in enumerate(unet.up_blocks):
            yield from _attn1(block, f"up_blocks.{i}", grids[-1])
            if block.upsamplers is not None:
                grids.pop()

    def middle_layer(self) -> str | None:
        """Return the first self-attention of the middle block."""
        return next((name for name in self.layers if name.startswith("mid_block.")), None)


def _attn1(block: Any, name: str, grid: tuple[int, int]) -> Iterator[AttentionLayer]:
    for i, attention in enumerate(getattr(block, "attentions", ())):
        for j, transformer in enumerate(getattr(attention, "transformer_blocks", ())):
            if not transformer.only_cross_attention:
                path = f"{name}.attentions.{i}.transformer_blocks.{j}.attn1"
                yield AttentionLayer(path, grid)


def _patches(network: Any, grid: TokenGrid) -> tuple[int, int]:
    patch = network.config.patch_size
    return grid.size[0] // patch, grid.size[1] // patch


class PixArtText(TextConditional):
    """PixArt-alpha and Sigma: patches of the image alone attend to each other, text by itself.

    Example::

        layers = list(PixArtText.find_layers(pipe.transformer, TokenGrid((128, 128))))
    """

    network_class = "PixArtTransformer2DModel"

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn1`` of every block."""
        transformer: Any = network
        for i in range(len(transformer.transformer_blocks)):
            name = f"transformer_blocks.{i}.attn1"
            yield AttentionLayer(name, _patches(network, grid))


class DiTLabels(PixArtText):
    """DiT as diffusers computes it, with class labels in the place of text.

    Example::

        layers = list(DiTLabels.find_layers(pipe.transformer, TokenGrid((32, 32))))
    """

    network_class = "DiTTransformer2DModel"

    @classmethod
    def corrected(
        cls, network: nn.Module, arguments: Mapping[str, Any], cfg: bool
    ) -> Mapping[str, Any]:
        """Return the arguments with the network's own null class, which follows its classes.

        ``DiTPipeline`` asks for class 1000 in the second half of the rows, as ImageNet's models
        want it.

        Raises:
            ValueError: a class that the network does not have.
        """
        transformer: Any = network
        classes = int(transformer.config.num_embeds_ada_norm)
        labels: Tensor = arguments["class_labels"].clone()
        if cfg:
            labels[len(labels) // 2 :] = classes
        wrong = labels[(labels < 0) | (labels > classes)].tolist()
        if wrong:
            raise ValueError(f"class {wrong[0]} does not exist: expected 0 to {classes - 1}")
        return {**arguments, "class_labels": labels}


class JointText(TextConditional):
    """Stable Diffusion 3: image and text in one sequence, the image's tokens first.

    Some blocks have a second attention, ``attn2``, of the image alone.

    Example::

        layers = list(JointText.find_layers(pipe.transformer, TokenGrid((128, 128))))
    """

    network_class = "SD3Transformer2DModel"
    shared = ("skip_layers",)

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn`` of every block, and ``attn2`` where there is one."""
        transformer: Any = network
        patches = _patches(network, grid)
        image = slice(0, patches[0] * patches[1])
        for i, block in enumerate(transformer.transformer_blocks):
            yield AttentionLayer(f"transformer_blocks.{i}.attn", patches, image)
            if block.attn2 is not None:
                yield AttentionLayer(f"transformer_blocks.{i}.attn2", patches)

    def middle_layer(self) -> str | None:
        """Return the joint attention in the middle of the depth."""
        joint = [name for name in self.layers if name.endswith(".attn")]
        return joint[(len(joint) - 1) // 2]


class PackedText(TextConditional):
    """FLUX: text first, then the image's tokens of 2 x 2 latent cells; later blocks join both.

    Example:
        >>> import torch
        >>> tokens = PackedText.packed(torch.zeros(1, 16, 64, 64))
        >>> tokens.shape, PackedText.unpacked(tokens, TokenGrid((64, 64))).shape
        (torch.Size([1, 1024, 64]), torch.Size([1, 16, 64, 64]))
    """

    network_class = "FluxTransformer2DModel"
    time_unit = 1000.0
    shared = ("img_ids", "txt_ids")

    @classmethod
    def own_channels(cls, network: nn.Module) -> int:
        """Return the channels of a latent cell, of which a token holds four."""
        return super().own_channels(network) // 4

    @classmethod
    def grid_of(cls, x: Tensor, arguments: Mapping[str, Any]) -> TokenGrid:
        """Read the grid from the positions that the tokens are given.

        Raises:
            ValueError: some tokens are not of the image that is drawn.
        """
        ids: Tensor = arguments["img_ids"]
        ids = ids if ids.ndim == 2 else ids[0]
        height, width = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
        if height * width != x.shape[1]:
            raise ValueError(
                f"{x.shape[1]} image tokens at positions of {height} x {width}: expected one "
                f"token each; sequences that also hold a reference image cannot be guided"
            )
        return TokenGrid((2 * height, 2 * width), arguments["encoder_hidden_states"].shape[1])

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn`` of every block of two streams, then of one."""
        transformer: Any = network
        patches = (grid.size[0] // 2, grid.size[1] // 2)
        image = slice(grid.text_tokens, grid.text_tokens + patches[0] * patches[1])
        for blocks in ("transformer_blocks", "single_transformer_blocks"):
            for i in range(len(getattr(transformer, blocks))):
                yield AttentionLayer(f"{blocks}.{i}.attn", patches, image)

    @staticmethod
    def unpacked(x: Tensor, grid: TokenGrid) -> Images:
        """Turn tokens (b, h/2 w/2, 4 c), ordered (c, row, column), into (b, c, h, w)."""
        # (b, i, j, c, row, column) -> (b, c, i, row, j, column)
        cells = x.unflatten(1, (grid.size[0] // 2, grid.size[1] // 2)).unflatten(-1, (-1, 2, 2))
        images: Tensor = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return images

    @staticmethod
    def packed(x_t: Images) -> Tensor:
        """Turn (b, c, h, w) into tokens of 2 x 2 cells."""
        # (b, c, i, row, j, column) -> (b, i, j, c, row, column)
        cells = x_t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        tokens: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return tokens


LAYOUTS: tuple[type[TextConditional], ...] = (
    UNetText,
    PixArtText,
    DiTLabels,
    JointText,
    PackedText,
)


def layout_of(network: nn.Module) -> type[TextConditional]:
    """Return the denoiser of a network's token layout.

    Raises:
        ValueError: the layout is not known; the message lists the known ones.
    """
    names = [each.__name__ for each in type(network).__mro__]
    for layout in LAYOUTS:
        if layout.network_class in names:
            return layout
    known = ", ".join(layout.network_class for layout in LAYOUTS)
    raise ValueError(
        f"{names[0]}: where the image's tokens attend in this network is not known, or it has no "
        f"softmax attention to read (Sana's is linear); known are {known}"
    )
