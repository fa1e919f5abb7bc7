"""The family of DiT and SiT: how their files are recognised, read, exported and fine-tuned.

Weights tell all of a DiT's sizes but three things. The token grid is found by comparing the stored
positions with those of each rectangle of as many tokens. Whether the last row of the label table is
a null class is taken to be so, as in every published DiT, unless there is one row only. The number
of heads is told by :func:`head_count`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sag_dit.bounds import Count, checked
from sag_dit.catalogue import entries
from sag_dit.identity import later
from sag_dit.models.dit import sit
from sag_dit.models.dit.layouts import DiffusersFolder, OfficialFile, renamed_from_diffusers
from sag_dit.models.dit.network import POSITION_TOLERANCE, SIZES, DiT, mlp_ratio, sincos_positions
from sag_dit.models.family import (
    Family,
    Refitted,
    State,
    WeightsFile,
    agreeing,
    checked_arguments,
    register,
    relabelled,
)

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
TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
PATCHES = "x_embedder.proj.weight"

XL = {**SIZES["DiT-XL/2"], "in_channels": 4, "num_classes": 1000}
ASSUMED_PROCESS = (
    "%s: nothing tells how the model was trained; DiT's way is assumed, eps on DDPM's linear betas "
    'of 1000 steps. If that is wrong, state {"model": {}, "process": ..., "kind": ...} in %s '
    "beside it"
)


MOST_TOKENS = 128
"""Tokens along a side of a model whose positions its files do not hold."""


@dataclass(frozen=True)
class DiffusersConfig:
    """Sizes in the config of diffusers' DiTTransformer2DModel, with the defaults of its class.

    Example:
        >>> DiffusersConfig().num_layers
        28
    """

    num_attention_heads: Count = 16
    attention_head_dim: Count = 72
    in_channels: Count = 4
    out_channels: Count | None = None
    patch_size: Count = 2
    sample_size: Count = 32
    num_layers: Count = 28
    num_embeds_ada_norm: Count = 1000


@register
class DiTFamily(Family):
    """DiT, and SiT, whose weights become those of a DiT when they are read.

    Example:
        >>> from pathlib import Path
        >>> state = DiT(input_size=8, hidden_size=32, depth=2, num_heads=1).state_dict()
        >>> DiTFamily().infer(state, Path("model.pt"), {"num_heads": 1}, None)["depth"]
        2
    """

    key = "dit"
    title = "diffusion transformer (DiT)"
    noun = "a DiT"
    source = "facebookresearch/DiT"
    layouts = MappingProxyType({"dit": OfficialFile(), "diffusers": DiffusersFolder()})
    pipeline = "DiTPipeline"
    diffusers = "DiTTransformer2DModel"
    told_by = "hidden_size"
    label_table = TABLE
    weights_alone = True
    fixed = (POSITIONS,)

    def network(self) -> type[DiT]:
        """Return DiT."""
        return DiT

    def required(self) -> list[str]:
        """Return all arguments that there have been from the beginning."""
        return [name for name in self._parameters() if name not in later(DiT)]

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether names of parameters are those of facebookresearch/DiT."""
        return all(name in state for name in TELLING)

    def read(self, file: WeightsFile) -> tuple[State, Mapping[str, Any]]:
        """Return an official file's weights, a SiT's turned into those of a DiT.

        A config that states a process is one of ours, and its weights are read as they are.
        """
        said = arguments_said(file.args, file.state)
        model = {**said["model"], **file.stated.get("model", {})}
        stated = {**said, **file.stated, **({"model": model} if model else {})}
        variant = None
        if "process" not in stated:
            variant = sit.variant_of(file.path, file.state, file.args)
        if variant is None:
            if "process" not in stated and not _known_training(file):
                log.warning(ASSUMED_PROCESS, file.path, file.path.with_suffix(".json").name)
            return file.state, stated
        state, known = sit.from_sit(file.state, variant)
        if len(state) < len(file.state):
            log.warning(
                "%s: taken for REPA's SiT, which predicts v on the straight line; REPA's "
                "projectors, which serve training, are left out",
                file.path,
            )
        return state, {**known, **stated}

    def infer(
        self, state: State, path: Path, stated: Mapping[str, Any], num_heads: int | None
    ) -> dict[str, Any]:
        """Return the arguments of the DiT whose weights these are.

        Raises:
            ValueError: they are not a DiT's, leave the size open, or are of another resolution than
                the published file of this name.
        """
        told = {} if num_heads is None else {"num_heads": num_heads}
        model = model_config(state, path, checked_arguments(DiT, {**stated, **told}, path))
        check_resolution(model, path)
        return model

    def reads_diffusers(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is that of diffusers' DiTTransformer2DModel."""
        # Published folders still bear the name of the class that DiT was split from.
        split_from = config.get("_class_name") == "Transformer2DModel"
        return super().reads_diffusers(config) or (
            split_from and config.get("norm_type") == "ada_norm_zero"
        )

    def from_diffusers(
        self, state: State, config: Mapping[str, Any], path: Path
    ) -> tuple[State, dict[str, Any]]:
        """Return the weights and arguments of a DiT that diffusers saved.

        diffusers itself divides the time's frequencies by 127 instead of 128 and adds 1e-5 instead
        of 1e-6 in a norm; the published weights were trained with the latter of each, which our
        network has.

        Raises:
            ValueError: it has what no DiT has, or weights that differ from block to block.
        """
        # Options of diffusers' class that would make it another network.
        expected = {"attention_bias": True, "activation_fn": "gelu-approximate"}
        strange = [key for key, value in expected.items() if config.get(key, value) != value]
        if strange:
            raise ValueError(f"{path}: {strange[0]}={config[strange[0]]!r}, which no DiT has")
        told = checked(config, DiffusersConfig, f"{path / 'config.json'}", open=True)
        heads, channels, patch = told.num_attention_heads, told.in_channels, told.patch_size
        hidden, size, depth = heads * told.attention_head_dim, told.sample_size, told.num_layers
        # Sizes have to be those of the weights, before anything of these sizes is made.
        bias = state.get("pos_embed.proj.bias")
        blocks = {name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}
        agreeing(
            path,
            ("num_attention_heads attention_head_dim", hidden, 0 if bias is None else len(bias)),
            ("num_layers", depth, len(blocks)),
        )
        if size // patch > MOST_TOKENS:
            raise ValueError(
                f"{path}: sample_size={size}, patch_size={patch}: expected at most {MOST_TOKENS} "
                f"tokens along a side"
            )
        try:
            renamed = renamed_from_diffusers(state, depth)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        renamed["pos_embed"] = sincos_positions(hidden, (size // patch, size // patch))[None]
        return renamed, {
            "input_size": size,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "num_heads": heads,
            "num_classes": told.num_embeds_ada_norm,
            "learn_sigma": (told.out_channels or channels) == 2 * channels,
        }

    def refit(self, before: Any, after: Any, names: Sequence[str], now: Sequence[str]) -> Refitted:
        """Give the new classes their rows of the label table, and the new grid its positions.

        Raises:
            ValueError: the positions are not the published ones, and the grid changes.
        """
        state, remade, kept = dict(before.state_dict()), {}, tuple(now)
        if tuple(now) != tuple(names):
            null = "the null row is kept" if len(state[TABLE]) > len(names) else "no null row"
            state[TABLE], kept = relabelled(state[TABLE], names, now)
            remade[TABLE] = f"label table of {len(names)} classes: now {len(now)}, {null}"
        old, new = before.grid, after.grid
        if old != new:
            state[POSITIONS] = repositioned(state[POSITIONS], old, new)
            remade[POSITIONS] = f"positions of {old[0]} x {old[1]} tokens: now {new[0]} x {new[1]}"
        return Refitted(state, kept, remade)


def _known_training(file: WeightsFile) -> bool:
    """Whether a file is of DiT's own training script, or has the published sizes."""
    shapes = [tuple(file.state[name].shape[:2]) for name in (PATCHES, TABLE) if name in file.state]
    published = shapes == [(XL["hidden_size"], XL["in_channels"]), (1001, XL["hidden_size"])]
    return published or str(file.args.get("model", "")).startswith("DiT-")


def arguments_said(args: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Return what the arguments of a training script, or of the network's class, say."""
    said: dict[str, Any] = {"model": {}}
    proj = state.get("x_embedder.proj.weight")
    width = None if proj is None else proj.shape[0]
    if args.get("hidden_size", width) != width:
        return said
    size = SIZES.get(str(args.get("model", "")).replace("SiT-", "DiT-"), {})
    if size and size["hidden_size"] == width:
        said["model"]["num_heads"] = size["num_heads"]
    for name in ("num_heads", "num_classes"):
        if type(args.get(name)) is int:
            said["model"][name] = args[name]
    if proj is not None and proj.shape[1] == 4 and args.get("vae") in ("ema", "mse"):
        said["vae"] = args["vae"]
    return said


def check_resolution(model: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that has the name of a published DiT and is one of another resolution.

    Raises:
        ValueError: it does; what it looks like is named.
    """
    # A cell of their latents is 8 pixels; in all else the published DiTs and SiTs are of one size.
    published = (each for each in entries("model").values() if each.family == "dit")
    sides = {str(each.file): (each.resolution or 0) // 8 for each in published}
    side, found = sides.get(path.name), model["input_size"]
    known = [name for name, each in sides.items() if each == found]
    if side in (None, found) or not known or not model.items() >= XL.items():
        return
    raise ValueError(
        f"{path}: not the published {path.name}: found input_size={found}, not {side}; it looks "
        f"like {' or '.join(known)}, so give it that name or fetch the file anew"
    )


def model_config(
    state: Mapping[str, Tensor], path: Path, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the constructor arguments of the DiT whose weights these are.

    ``stated`` are the arguments that the checkpoint itself gives; they override what is inferred.

    Raises:
        ValueError: the weights are not a DiT's, or leave the size open.
    """
    # What tells the size has to be there, and of the right number of dimensions.
    missing = [name for name in TELLING if name not in state]
    if missing:
        raise ValueError(
            f"{path}: not a DiT: {', '.join(missing)} missing; found {', '.join(list(state)[:5])}, "
            f"...; expected the parameters of facebookresearch/DiT"
        )
    shapes = {name: tuple(state[name].shape) for name in TELLING}
    odd = [f"{name} {shapes[name]}" for name in TELLING if len(shapes[name]) != TELLING[name]]
    if odd:
        raise ValueError(
            f"{path}: not a DiT: {', '.join(odd)} of unexpected shape; expected those of "
            f"facebookresearch/DiT"
        )
    # Widths are read off the patch embedding, the MLP and the last layer.
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] / patch**2
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{path}: {out_channels:g} output channels for {channels} input channels; expected as "
            f"many, or twice as many where the variance is learned"
        )
    # Counted, not the highest number: of a gap, strict loading tells.
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    labels, mlp_size = (shapes[name][0] for name in (TABLE, "blocks.0.mlp.fc1.weight"))
    told: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "learn_sigma": out_channels == 2 * channels,
    }
    inferred = {
        **told,
        "mlp_ratio": mlp_ratio(hidden, mlp_size),
        **_labels(labels, stated, path),
        **stated,
    }
    # What shapes leave open is found by other means.
    if "input_size" not in stated:
        rows, columns = grid_of(state["pos_embed"][0], path)
        square = rows == columns
        inferred["input_size"] = rows * patch if square else [rows * patch, columns * patch]
    if "num_heads" not in stated:
        inferred["num_heads"] = head_count(hidden, depth, path)
    # What is stated has to be so, before a network of these sizes is built.
    size = inferred["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    dropped = inferred["class_dropout_prob"] > 0
    agreeing(
        path,
        *((name, inferred[name], value) for name, value in told.items()),
        ("int(hidden_size mlp_ratio)", int(hidden * inferred["mlp_ratio"]), mlp_size),
        ("rows of the label table", inferred["num_classes"] + dropped, labels),
        ("tokens", (height // patch) * (width // patch), shapes[POSITIONS][1]),
    )
    return inferred


def _labels(rows: int, stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the number of classes, and whether labels were dropped in training."""
    classes = int(stated.get("num_classes", max(rows - 1, 1)))
    if "num_classes" not in stated and rows not in (1, XL["num_classes"] + 1):
        log.warning(
            "%s: of the %d rows of the label table the last is taken for the null class; if there "
            'is none, state {"model": {"num_classes": %d}} in %s beside it',
            path,
            rows,
            rows,
            path.with_suffix(".json").name,
        )
    return {"num_classes": classes, "class_dropout_prob": 0.1 if rows > classes else 0.0}


def grid_of(positions: Tensor, path: Path) -> tuple[int, int]:
    """Find the rows and columns whose positions (n, d) these are.

    Positions of none (learned ones, for example) are taken for a square's, and that is logged.

    Raises:
        ValueError: they are of no rectangle, and n is not a square.
    """
    # All rectangles of as many tokens are compared with the published table.
    count, width = positions.shape
    root = math.isqrt(count)
    rectangles = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    if width % 4 == 0:
        # Squares first: they are the commonest by far.
        for grid in sorted(rectangles, key=lambda grid: abs(grid[0] - grid[1])):
            expected = sincos_positions(width, grid)
            if torch.allclose(positions.float(), expected, rtol=0, atol=POSITION_TOLERANCE):
                return grid
    # Other positions do not tell: a square is the best guess, where there is one.
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
    # A published size is known by its width and depth.
    sizes = {(size["hidden_size"], size["depth"]): size["num_heads"] for size in SIZES.values()}
    if (hidden, depth) in sizes:
        return sizes[hidden, depth]
    # Else the width suggests a number, which is a guess and said to be one.
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
        "that is wrong, so are the pictures: %s, or num_heads=N, also of load(...)",
        path,
        heads,
        hidden // heads,
        remedy,
    )
    return heads


def repositioned(
    positions: Float[Tensor, "1 n d"], before: tuple[int, int], now: tuple[int, int]
) -> Float[Tensor, "1 m d"]:
    """Return the fixed positions of another grid.

    Raises:
        ValueError: the positions are not the published ones, such as learned positions.
    """
    width = positions.shape[-1]
    expected = sincos_positions(width, before)
    if not torch.allclose(positions[0].float(), expected, rtol=0, atol=POSITION_TOLERANCE):
        raise ValueError(
            "the checkpoint's pos_embed is not the published table, so that another resolution's "
            "cannot be computed; leave resolution=null, which keeps the checkpoint's"
        )
    return sincos_positions(width, now)[None].to(positions.dtype)
