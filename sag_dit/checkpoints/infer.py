"""Reading a DiT's size from the shapes of its weights.

Everything but three things is in the shapes. The token grid is found by comparing the stored
positions with those of each rectangle of as many tokens. Whether the last row of the label table
is a null class is not in the weights: it is taken to be, as in every published DiT, unless there is
one row only. The number of heads is neither: see :func:`head_count`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sag_dit.checkpoints.config import mlp_ratio
from sag_dit.checkpoints.files import EXPECTED
from sag_dit.models import SIZES
from sag_dit.models.embeddings import sincos_positions

log = logging.getLogger(__name__)

# The weights that tell the size, and how many dimensions each has.
TELLING = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
HEAD_WIDTHS = (64, 72, 32, 16, 8)
# Half-precision files round positions by up to 2^-9.
POSITION_TOLERANCE = 0.01


def model_config(
    state: Mapping[str, Tensor], path: Path, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the constructor arguments of the DiT whose weights these are.

    ``stated`` are the arguments that the checkpoint itself gives; they override what is inferred.

    Raises:
        ValueError: the weights are not a DiT's, or leave the size open.
    """
    missing = [name for name in TELLING if name not in state]
    if missing:
        raise ValueError(
            f"{path}: not a DiT: {', '.join(missing)} missing; found {', '.join(list(state)[:5])}, "
            f"...; {EXPECTED}"
        )
    shapes = {name: tuple(state[name].shape) for name in TELLING}
    odd = [f"{name} {shapes[name]}" for name in TELLING if len(shapes[name]) != TELLING[name]]
    if odd:
        raise ValueError(f"{path}: not a DiT: {', '.join(odd)} of unexpected shape; {EXPECTED}")
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] / patch**2
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{path}: {out_channels:g} output channels for {channels} input channels; expected as "
            f"many, or twice as many where the variance is learned"
        )
    # Counted, not the highest number: of a gap, strict loading tells.
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    inferred: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "mlp_ratio": mlp_ratio(hidden, shapes["blocks.0.mlp.fc1.weight"][0]),
        "learn_sigma": out_channels == 2 * channels,
        **_labels(shapes["y_embedder.embedding_table.weight"][0], stated),
        **stated,
    }
    if "input_size" not in stated:
        rows, columns = grid_of(state["pos_embed"][0], path)
        square = rows == columns
        inferred["input_size"] = rows * patch if square else [rows * patch, columns * patch]
    if "num_heads" not in stated:
        inferred["num_heads"] = head_count(hidden, depth, path)
    return inferred


def _labels(rows: int, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of classes, and whether labels were dropped in training."""
    classes = int(stated.get("num_classes", max(rows - 1, 1)))
    return {"num_classes": classes, "class_dropout_prob": 0.1 if rows > classes else 0.0}


def grid_of(positions: Tensor, path: Path) -> tuple[int, int]:
    """Find the rows and columns whose positions (n, d) these are.

    Positions of none (learned ones, for example) are taken for a square's, and that is logged.

    Raises:
        ValueError: they are of no rectangle, and n is not a square.
    """
    count, width = positions.shape
    root = math.isqrt(count)
    rectangles = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    if width % 4 == 0:
        # Squares first: they are the commonest by far.
        for grid in sorted(rectangles, key=lambda grid: abs(grid[0] - grid[1])):
            expected = sincos_positions(width, grid)
            if torch.allclose(positions.float(), expected, rtol=0, atol=POSITION_TOLERANCE):
                return grid
    if root * root != count:
        raise ValueError(
            f"{path}: pos_embed holds {count} positions that are those of no rectangle; state "
            f'{{"model": {{"input_size": [height, width]}}}} in {path.with_suffix(".json").name} '
            f"beside it"
        )
    log.warning(
        "%s: pos_embed is not the published table of positions; a square of %d x %d tokens is "
        "assumed",
        path,
        root,
        root,
    )
    return root, root


def head_count(hidden: int, depth: int, path: Path) -> int:
    """Return the number of attention heads, which the weights do not hold.

    A published width has its published number. For others the widest head of 64, 72, 32, 16 or 8
    that divides the width is assumed, in this order. Unless width and depth are those of a
    published size, the assumption is logged.

    Raises:
        ValueError: none of them divides the width.
    """
    remedy = f'state {{"model": {{"num_heads": N}}}} in {path.with_suffix(".json").name} beside it'
    sizes = {(size["hidden_size"], size["depth"]): size["num_heads"] for size in SIZES.values()}
    if (hidden, depth) in sizes:
        return sizes[hidden, depth]
    by_width = {width: heads for (width, _), heads in sizes.items()}
    guesses = [hidden // width for width in HEAD_WIDTHS if hidden % width == 0]
    if hidden not in by_width and not guesses:
        raise ValueError(
            f"{path}: weights do not tell the number of attention heads, and width {hidden} "
            f"suggests none; {remedy}"
        )
    heads = by_width.get(hidden) or guesses[0]
    log.warning(
        "%s: weights do not tell the number of attention heads; %d of width %d are assumed. If "
        "that is wrong, so are the pictures: %s, or call load(..., num_heads=N)",
        path,
        heads,
        hidden // heads,
        remedy,
    )
    return heads
