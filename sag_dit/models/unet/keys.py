"""Parameter names of openai/guided-diffusion and openai/improved-diffusion, turned into ours."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sag_dit.models.family import State
from sag_dit.models.unet.parts import Part

# theirs -> ours, once per network
NETWORK = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# theirs -> ours, within a residual block
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# theirs -> ours, within an attention block; queries, keys and values are split besides
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
RESAMPLE = {"op": "conv", "conv": "conv"}
# theirs -> ours, within a classifier's attention pool
POOL = {"qkv_proj": "qkv", "c_proj": "proj"}


def split_qkv(joined: Tensor, num_heads: int | None, new_order: bool) -> tuple[Tensor, ...]:
    """Return queries, keys and values, rows ordered by head, of a joined weight or bias.

    The legacy order is (head, which, channel), the new one (which, head, channel). A kernel of
    size 1 is dropped. ``num_heads`` only matters in the legacy order.
    """
    if joined.ndim == 3:
        joined = joined.squeeze(-1)
    if new_order or num_heads is None:
        return joined.chunk(3)
    by_head = joined.unflatten(0, (num_heads, 3, -1))
    return tuple(by_head[:, i].flatten(0, 1) for i in range(3))


def from_published(
    state: State,
    parts: Iterable[Part],
    num_heads: int | None,
    num_head_channels: int | None,
    new_attention_order: bool,
) -> State:
    """Rename a published UNet's or classifier's parameters.

    Names that have no counterpart are kept, so that strict loading reports them; so are absent
    ones, by their absence.
    """
    left = dict(state)
    renamed: State = {}

    def move(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in left:
                tensor = left.pop(f"{theirs}.{kind}")
                # Their linear layers within attention are convolutions of kernel size 1.
                renamed[f"{ours}.{kind}"] = tensor.squeeze(-1) if tensor.ndim == 3 else tensor

    for theirs, ours in NETWORK.items():
        move(theirs, ours)
    # Blocks: which of ours is which of theirs, the parts tell.
    for part in parts:
        names = {"resnet": RESNET, "attention": ATTENTION, "resample": RESNET | RESAMPLE}
        for theirs, ours in names[part.kind].items():
            move(f"{part.published}.{theirs}", f"{part.name}.{ours}")
        # They keep queries, keys and values in one tensor, we in three.
        if part.kind == "attention":
            for kind in ("weight", "bias"):
                joined = left.pop(f"{part.published}.qkv.{kind}", None)
                if joined is None:
                    continue
                heads = num_heads or joined.shape[0] // 3 // (num_head_channels or 1)
                split = split_qkv(joined, heads, new_attention_order)
                for name, tensor in zip(("to_q", "to_k", "to_v"), split, strict=True):
                    renamed[f"{part.name}.{name}.{kind}"] = tensor
    # A classifier ends in an attention pool.
    for theirs, ours in POOL.items():
        move(f"out.2.{theirs}", f"pool.{ours}")
    if "out.2.positional_embedding" in left:
        renamed["pool.pos_embed"] = left.pop("out.2.positional_embedding").T
    return {**renamed, **left}
