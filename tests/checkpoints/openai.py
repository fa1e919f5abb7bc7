"""Names and shapes of openai's checkpoints, walked as their constructors build them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sag_dit.models.unet.adapter import Sizes, Variant

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, out: int, inner: int, *kernel: int) -> Shapes:
    yield f"{name}.weight", (out, inner, *kernel)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def resnet(name: str, inner: int, out: int, sizes: Sizes) -> Shapes:
    yield from norm(f"{name}.in_layers.0", inner)
    yield from linear(f"{name}.in_layers.2", out, inner, 3, 3)
    yield from linear(
        f"{name}.emb_layers.1", out * (1 + sizes.scale_shift_norm), 4 * sizes.model_channels
    )
    yield from norm(f"{name}.out_layers.0", out)
    yield from linear(f"{name}.out_layers.3", out, out, 3, 3)
    if inner != out:
        yield from linear(f"{name}.skip_connection", out, inner, 1, 1)


def attention(name: str, width: int) -> Shapes:
    yield from norm(f"{name}.norm", width)
    yield from linear(f"{name}.qkv", 3 * width, width, 1)
    yield from linear(f"{name}.proj_out", width, width, 1)


def shapes(sizes: Sizes, side: int) -> Shapes:
    """Every parameter of a published network, in the order of its constructor."""
    base, depth = sizes.model_channels, sizes.num_res_blocks
    widths = [int(factor * base) for factor in sizes.channel_mult]
    yield from linear("time_embed.0", 4 * base, base)
    yield from linear("time_embed.2", 4 * base, 4 * base)
    if sizes.learn_sigma is not None and sizes.num_classes:
        yield "label_emb.weight", (sizes.num_classes, 4 * base)
    yield from linear("input_blocks.0.0", widths[0], sizes.in_channels, 3, 3)
    skips, width, index = [widths[0]], widths[0], 1
    for level, out in enumerate(widths):
        for _ in range(depth):
            yield from resnet(f"input_blocks.{index}.0", width, out, sizes)
            if level in sizes.attending:
                yield from attention(f"input_blocks.{index}.1", out)
            width = out
            skips.append(width)
            index += 1
        if level < len(widths) - 1:
            name = f"input_blocks.{index}.0"
            if sizes.resblock_updown:
                yield from resnet(name, width, width, sizes)
            else:
                yield from linear(f"{name}.op", width, width, 3, 3)
            skips.append(width)
            index += 1
    yield from resnet("middle_block.0", width, width, sizes)
    yield from attention("middle_block.1", width)
    yield from resnet("middle_block.2", width, width, sizes)
    yield from norm("out.0", widths[-1] if sizes.learn_sigma is None else widths[0])
    if sizes.learn_sigma is None:
        tokens = (side >> (len(widths) - 1)) ** 2 + 1
        yield "out.2.positional_embedding", (width, tokens)
        yield from linear("out.2.qkv_proj", 3 * width, width, 1)
        yield from linear("out.2.c_proj", sizes.num_classes, width, 1)
        return
    index = 0
    for level in reversed(range(len(widths))):
        for i in range(depth + 1):
            place = 1
            yield from resnet(f"output_blocks.{index}.0", width + skips.pop(), widths[level], sizes)
            width = widths[level]
            if level in sizes.attending:
                yield from attention(f"output_blocks.{index}.1", width)
                place = 2
            if level and i == depth:
                name = f"output_blocks.{index}.{place}"
                if sizes.resblock_updown:
                    yield from resnet(name, width, width, sizes)
                else:
                    yield from linear(f"{name}.conv", width, width, 3, 3)
            index += 1
    out = 3 * (1 + sizes.learn_sigma)
    yield from linear("out.2", out, widths[0], 3, 3)


def state_of(variant: Variant, device: str = "meta") -> dict[str, Tensor]:
    """The state dict of a published file, by default without memory."""
    return {
        name: torch.empty(shape, device=device)
        for name, shape in shapes(variant.sizes, variant.input_size)
    }
