"""What the tests of the tap share: edits, and ways to look into a network from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from sag_dit.attention import AttentionEdit, AttentionLayer, InputEdit, OutputEdit
from sag_dit.attention.edits import Attend
from sag_dit.models import DiT

LAYERS = [AttentionLayer(f"blocks.{i}.attn", (4, 4)) for i in range(3)]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Identity(AttentionEdit):
    """Every token looks at itself only."""

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        return value


@dataclass(frozen=True)
class Same(AttentionEdit):
    """Attend as without the edit."""

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        return attend(query, key, value)


@dataclass(frozen=True)
class ScaledQueries(AttentionEdit):
    by: float

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        return attend(self.by * query, key, value)


@dataclass(frozen=True)
class Skip(OutputEdit):
    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Scale(OutputEdit):
    by: float

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return self.by * output


@dataclass(frozen=True)
class Reverse(InputEdit):
    def edit_input(self, x: Tensor) -> Tensor:
        return x.flip(1)


def queries_and_keys(network: DiT, inputs: Inputs, index: int) -> tuple[Tensor, Tensor]:
    """Heads of one block, worked out from what enters its attention and from its weights."""
    seen: list[Tensor] = []
    attn = network.blocks[index].attn
    handle = attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(*inputs)
    handle.remove()
    b, n, d = seen[0].shape
    projected = seen[0] @ attn.qkv.weight.T + attn.qkv.bias
    query, key, _ = projected.reshape(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
    return query, key


def traces(network: nn.Module) -> list[str]:
    """What a tap could leave behind."""
    found = [
        name
        for name, module in network.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called
    ]
    return found + [repr(mode) for mode in _get_current_function_mode_stack()]


def small_unet() -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]
