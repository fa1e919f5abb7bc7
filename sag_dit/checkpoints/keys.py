"""Parameter names: those of facebookresearch/DiT, which are ours, and those of diffusers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

WRAPPERS = ("module.", "_orig_mod.", "denoiser.network.")
"""Prefixes of modules around a DiT: data parallel, compiled, and our LightningModule."""

# ours -> diffusers, once per model
MODEL = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# ours -> diffusers, within a block
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# ours, once per model -> diffusers, repeated in every block
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# The table of positions is computed; some converters leave it in the file.
POSITIONS = ("pos_embed", "pos_embed.pos_embed")


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """Return a network's own entries, without the prefixes of what was wrapped around it."""
    entries = dict(state)
    for _ in WRAPPERS:
        for prefix in WRAPPERS:
            inner = {
                name.removeprefix(prefix): tensor
                for name, tensor in entries.items()
                if name.startswith(prefix)
            }
            entries = inner or entries
    return entries


def from_diffusers(state: Mapping[str, Tensor], depth: int) -> State:
    """Rename the parameters of diffusers' DiTTransformer2DModel, joining queries, keys and values.

    The table of positions is left to the caller. Names that have no counterpart are kept, so that
    strict loading reports them; so are absent ones, by their absence.

    Raises:
        ValueError: the blocks' copies of the embedders differ, which no DiT can express.
    """
    left = {name: tensor for name, tensor in state.items() if name not in POSITIONS}
    renamed: State = {}

    def move(ours: str, theirs: str) -> None:
        if theirs in left:
            renamed[ours] = left.pop(theirs)

    for ours, theirs in MODEL.items():
        for part in ("weight", "bias"):
            move(f"{ours}.{part}", f"{theirs}.{part}")
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for part in ("weight", "bias"):
            for ours, theirs in BLOCK.items():
                move(f"blocks.{i}.{ours}.{part}", f"{block}.{theirs}.{part}")
            names = [f"{block}.{name}.{part}" for name in QKV]
            if all(name in left for name in names):
                joined = torch.cat([left.pop(name) for name in names])
                renamed[f"blocks.{i}.attn.qkv.{part}"] = joined
        for ours, theirs in EMBEDDERS.items():
            copy = left.pop(f"{block}.norm1.emb.{theirs}", None)
            if copy is None:
                continue
            if not torch.equal(renamed.setdefault(ours, copy), copy):
                raise ValueError(
                    f"{block}.norm1.emb.{theirs} differs from the first block's; expected the one "
                    f"embedder of a DiT, repeated in every block"
                )
    return {**renamed, **left}
