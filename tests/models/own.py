"""A backbone of one's own, as the documentation says that one is written: a network, a family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer
from sag_dit.models import Family, register


class SelfAttention(nn.Module):
    """Each pixel looks at all others, through one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class Tiny(nn.Module):
    """Pixels are tokens; time and class are added to each."""

    key = "tiny"
    patch_size = 1
    aliases: dict[str, str] = {}  # noqa: RUF012
    checkpoint_blocks = False

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        num_classes: int,
        width: int = 16,
        depth: int = 2,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = {
            "input_size": input_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "class_dropout_prob": class_dropout_prob,
            "learn_sigma": learn_sigma,
        }
        self.input_size = (input_size, input_size)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.null_label = num_classes if class_dropout_prob > 0 else None
        self.dropped = class_dropout_prob
        self.first = nn.Linear(in_channels, width)
        self.place = nn.Parameter(torch.randn(input_size**2, width) / 10)
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, in_channels * (1 + learn_sigma))
        self.layers = {
            name: AttentionLayer(name, self.input_size)
            for name in (f"blocks.{i}.attention" for i in range(depth))
        }

    def compile_blocks(self) -> None:
        for block in self.blocks:
            block.compile()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(y.shape) < self.dropped, self.num_classes, y)
        told = self.time(t.to(x)[:, None] / 1000) + self.label(y)
        tokens = self.first(x.flatten(2).mT) + self.place + told[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.last(tokens).mT.unflatten(2, self.input_size)  # type: ignore[no-any-return]


@register
class TinyFamily(Family):
    """Its files are our own, so that no method has to be written but one."""

    key = "tiny"
    title = "tiny transformer"
    noun = "a Tiny"
    source = "the tests"

    def network(self) -> type[Any]:
        return Tiny
