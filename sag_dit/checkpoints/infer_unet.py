"""Reading a published UNet's or classifier's sizes from the names and shapes of its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sag_dit.checkpoints import keys, published, unet_keys
from sag_dit.checkpoints.published import Sizes, Variant
from sag_dit.models.unet_parts import decoder_parts, encoder_parts

log = logging.getLogger(__name__)

FIRST = "input_blocks.0.0.weight"
HEADS = ("num_heads", "num_head_channels")


class Block(NamedTuple):
    """One of the published input_blocks: its width, and what it does beside convolving."""

    width: int
    attends: bool
    resamples: bool


@dataclass(frozen=True)
class Converted:
    """Weights under our names, and the config that goes with them."""

    state: keys.State
    model: Mapping[str, Any]
    process: Mapping[str, Any]


def sizes_of(state: Mapping[str, Tensor], path: Path) -> Sizes:
    """Read the sizes of a published UNet or classifier.

    Raises:
        ValueError: the weights fit none.
    """
    count = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")})
    try:
        blocks = [_block(state, i) for i in range(1, count)]
        model_channels = state["time_embed.0.weight"].shape[1]
        in_channels = state[FIRST].shape[1]
        norm = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        classifier = published.is_classifier(state)
        out = state["out.2.c_proj.weight" if classifier else "out.2.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path}: looks like a UNet of openai/guided-diffusion, but {error} is missing or of "
            f"another shape; expected all of its weights"
        ) from None
    ups = len({n for n in state if n.startswith("output_blocks.") and _upsamples(n)})
    found = [
        depth
        for depth in range(1, count)
        if count % (depth + 1) == 0
        and _regular(blocks, depth)
        and (classifier or count // (depth + 1) == ups + 1)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path}: its {count} input_blocks are not those of levels of equally many residual "
            f"blocks, each but the last with a resampling; found {_listed(blocks)}"
        )
    (depth,) = found
    firsts = blocks[:: depth + 1]
    # An upsampler also sees the small image.
    pixels = in_channels // 2 if in_channels == 6 else in_channels
    labels = state.get("label_emb.weight")
    return Sizes(
        in_channels=in_channels,
        model_channels=model_channels,
        num_res_blocks=depth,
        channel_mult=tuple(_number(block.width / model_channels) for block in firsts),
        attending=tuple(level for level, block in enumerate(firsts) if block.attends),
        scale_shift_norm=norm == 2 * blocks[0].width,
        resblock_updown=not any(".op." in name for name in state),
        num_classes=out if classifier else 0 if labels is None else labels.shape[0],
        learn_sigma=None if classifier else out == 2 * pixels,
    )


def _number(ratio: float) -> float:
    return int(ratio) if ratio.is_integer() else ratio


def _block(state: Mapping[str, Tensor], index: int) -> Block:
    prefix = f"input_blocks.{index}"
    resampling = state.get(f"{prefix}.0.op.weight")
    if resampling is not None:
        return Block(resampling.shape[0], attends=False, resamples=True)
    width = state[f"{prefix}.0.out_layers.3.weight"].shape[0]
    return Block(width, f"{prefix}.1.qkv.weight" in state, resamples=False)


def _upsamples(name: str) -> bool:
    """Whether a parameter is the first of an upsampler: a convolution or second residual block."""
    _, _, place, *rest = name.split(".")
    return place != "0" and rest in (["conv", "weight"], ["in_layers", "0", "weight"])


def _regular(blocks: list[Block], depth: int) -> bool:
    """Whether blocks are levels of ``depth`` equal ones, each but the last with a resampling."""
    explicit = any(block.resamples for block in blocks)
    for start in range(0, len(blocks), depth + 1):
        level, down = blocks[start : start + depth], blocks[start + depth : start + depth + 1]
        if len(set(level)) != 1 or level[0].resamples:
            return False
        if any(d != Block(level[0].width, False, explicit) for d in down):
            return False
    return True


def _listed(blocks: list[Block]) -> str:
    return " ".join(f"{b.width}{'a' * b.attends}{'s' * b.resamples}" for b in blocks)


def convert(
    state: keys.State, path: Path, stated: Mapping[str, Any], *, classifier: bool = False
) -> Converted:
    """Turn published weights into ours, with the config of the published model they are of.

    ``stated`` is a config that lies beside the file; what it says overrides what is inferred, and
    ``new_attention_order`` in it tells how queries, keys and values lie.

    Raises:
        ValueError: the weights are of another kind or variant than asked for, or nothing tells the
            size of the images and the heads.
    """
    sizes = sizes_of(state, path)
    if published.is_classifier(state) != classifier:
        what, wanted = ("a classifier", "a diffusion model")[:: -1 if classifier else 1]
        raise ValueError(
            f"{path}: {what}, where {wanted} is expected; {published.resembling(sizes)}"
        )
    own = dict(stated.get("model", {}))
    variant = _variant(sizes, path, bool(own))
    if sizes.in_channels == 6:
        raise ValueError(
            f"{path}: an upsampler, which enlarges images and is not read; "
            f"{published.resembling(sizes)}"
        )
    known: dict[str, Any] = {}
    process: Mapping[str, Any] = {}
    new_order = bool(stated.get(published.ORDER, False))
    if variant is not None:
        known = {"input_size": variant.input_size, **variant.arguments}
        process = variant.process
        new_order = bool(stated.get(published.ORDER, variant.new_attention_order))
    if any(own.get(name) for name in HEADS):
        known = {name: value for name, value in known.items() if name not in HEADS}
    model = {**known, **own}
    _require_heads(model, path)
    size = model["input_size"]
    height = size if isinstance(size, int) else size[0]
    arguments = {
        "in_channels": sizes.in_channels,
        "model_channels": sizes.model_channels,
        "num_res_blocks": sizes.num_res_blocks,
        "channel_mult": list(sizes.channel_mult),
        "attention_resolutions": [height >> level for level in sizes.attending],
        "scale_shift_norm": sizes.scale_shift_norm,
        "resblock_updown": sizes.resblock_updown,
        "num_classes": sizes.num_classes,
        **({} if classifier else {"learn_sigma": sizes.learn_sigma}),
        **model,
    }
    levels = len(sizes.channel_mult)
    where = (levels, sizes.num_res_blocks, [i in sizes.attending for i in range(levels)])
    parts = [*encoder_parts(*where), *([] if classifier else decoder_parts(*where))]
    heads, channels = (model.get(name) for name in HEADS)
    renamed = unet_keys.from_published(state, parts, heads, channels, new_order)
    return Converted(renamed, arguments, process)


def _variant(sizes: Sizes, path: Path, stated: bool) -> Variant | None:
    """Return the published model that a file holds, by its sizes and its name.

    Raises:
        ValueError: it has the name of one and the sizes of another, and no config explains it.
    """
    named, same = published.by_file(path.name), published.alike(sizes)
    if named in same:
        return named
    if named is not None and not stated:
        raise ValueError(
            f"{path}: not the published {named.file}: found "
            f"{sizes.differences(named.sizes)}; {published.resembling(sizes)}"
        )
    if not same:
        return None
    if not stated:
        log.info("%s: taken for %s, by its sizes", path, same[0].file)
    return same[0]


def _require_heads(model: Mapping[str, Any], path: Path) -> None:
    missing = [] if "input_size" in model else ["input_size"]
    if not any(model.get(name) for name in HEADS):
        missing.append(" or ".join(HEADS))
    if missing:
        raise ValueError(
            f"{path}: weights do not tell {' and '.join(missing)}, and no published model has "
            f'their sizes; state {{"model": {{"input_size": N, "num_heads": N}}}} in '
            f"{path.with_suffix('.json').name} beside it"
        )
