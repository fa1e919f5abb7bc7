"""The family of ADM's and IDDPM's UNets, and of ADM's classifiers: how their files are read.

Sizes are read from the names and shapes of the weights. What these do not tell, the size of the
images, the heads, the schedule and the times, is known of the published model of the same sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sag_dit.catalogue import Kind, entries
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
from sag_dit.models.unet.parts import Part, decoder_parts, encoder_parts
from sag_dit.models.unfilled import unfilled

if TYPE_CHECKING:
    # Their library takes seconds to import.
    from sag_dit.models.unet.classifier import Classifier
    from sag_dit.models.unet.network import UNet

TABLE = "class_embedding.weight"
DROPPED = 0.1
"""Share of labels left out where a model without classes learns some."""

ORDER = "new_attention_order"
"""The key of a config beside published weights that tells how queries, keys and values lie."""


@dataclass(frozen=True)
class Sizes:
    """What weights tell of a UNet or, with ``learn_sigma`` None, of a classifier.

    ``attending`` are the levels that attend, 0 being the input's.

    Example::

        sizes = sizes_of(state, Path("my_unet.pt"))
        print(sizes.differences(variants()[0].sizes))
    """

    in_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[float, ...]
    attending: tuple[int, ...]
    scale_shift_norm: bool
    resblock_updown: bool
    num_classes: int
    learn_sigma: bool | None

    def differences(self, other: Sizes) -> str:
        """Return in words where another has other sizes."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name}={mine[name]!r}, not {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )


@dataclass(frozen=True)
class Variant:
    """A published file: its sizes, and what its weights do not tell.

    Attributes:
        file: its official name.
        input_size: the side of its images.
        arguments: of UNet or Classifier, beside sizes.
        process: the process it was trained on.
        new_attention_order: how its queries, keys and values lie.

    Example:
        >>> {each.file: each.input_size for each in variants()}["256x256_diffusion.pt"]
        256
    """

    file: str
    sizes: Sizes
    input_size: int
    arguments: Mapping[str, Any]
    process: Mapping[str, Any] = field(default_factory=dict)
    new_attention_order: bool = False


@cache
def variants(*kinds: Kind) -> tuple[Variant, ...]:
    """Return the published files of some kinds, as the catalogue tells them; all by default."""
    return tuple(
        Variant(
            each.file or "",
            Sizes(**{name: _hashable(value) for name, value in each.weights["sizes"].items()}),
            each.resolution or 0,
            each.weights["arguments"],
            each.weights.get("process", {}),
            each.weights.get("new_attention_order", False),
        )
        for each in entries(*kinds).values()
        if each.family == "unet"
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether names are those of openai/guided-diffusion or openai/improved-diffusion."""
    return "input_blocks.0.0.weight" in state and "time_embed.0.weight" in state


def is_classifier(state: Mapping[str, Tensor]) -> bool:
    """Whether published weights are those of a classifier, which ends in an attention pool."""
    return "out.2.positional_embedding" in state


def by_file(name: str) -> Variant | None:
    """Return the variant whose official file has this name, or None."""
    return next((variant for variant in variants() if variant.file == name), None)


def alike(sizes: Sizes) -> list[Variant]:
    """Return the variants of these sizes."""
    return [variant for variant in variants() if variant.sizes == sizes]


def resembling(sizes: Sizes) -> str:
    """Return in words which published file weights of these sizes look like."""
    same = alike(sizes)
    if same:
        return f"it looks like {' or '.join(variant.file for variant in same)}"
    mine = asdict(sizes)

    def shared(variant: Variant) -> int:
        return sum(value == mine[name] for name, value in asdict(variant.sizes).items())

    nearest = max(variants(), key=shared)
    return (
        f"no published file has its sizes, and {nearest.file} comes nearest (found "
        f"{sizes.differences(nearest.sizes)})"
    )


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


log = logging.getLogger(__name__)

FIRST = "input_blocks.0.0.weight"
HEADS = ("num_heads", "num_head_channels")


@register
class UNetFamily(Family):
    """The UNets of ADM and IDDPM.

    Example:
        >>> UNetFamily().describes({"model_channels": 32, "input_size": 16})
        True
    """

    key = "unet"
    title = "UNet (of ADM's and IDDPM's kind)"
    noun = "a UNet"
    source = "openai/guided-diffusion or openai/improved-diffusion, here under diffusers' names"

    told_by = "model_channels"
    label_table = TABLE
    weights_alone = True

    def network(self) -> type[UNet]:
        """Return UNet."""
        from sag_dit.models.unet.network import UNet

        return UNet

    def required(self) -> list[str]:
        """Return the size of the images; all else has the value that is usual."""
        return ["input_size"]

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether names of parameters are those of openai's code."""
        return is_published(state)

    def read(self, file: WeightsFile) -> tuple[State, Mapping[str, Any]]:
        """Return the weights of openai's code under our names; our own are left as they are."""
        if not is_published(file.state):
            return file.state, file.stated
        converted = convert(file.state, file.path, file.stated)
        process = {"process": converted.process} if converted.process else {}
        own = {name: value for name, value in file.stated.items() if name != ORDER}
        return converted.state, {**process, **own, "model": converted.model}

    def infer(
        self, state: State, path: Path, stated: Mapping[str, Any], num_heads: int | None
    ) -> dict[str, Any]:
        """Return what is stated: weights were read by their heads, which cannot change then.

        Raises:
            ValueError: ``num_heads`` is given.
        """
        if num_heads is not None:
            raise ValueError(
                f"num_heads={num_heads}: a UNet's weights are read by its heads; state "
                f'{{"model": {{"num_heads": {num_heads}}}}} in '
                f"{path.with_suffix('.json').name} beside them"
            )
        model = checked_arguments(self.network(), stated, path)
        # What is stated has to be so, before a network of these sizes is built.
        full = {name: each.default for name, each in self._parameters().items()} | model
        channels, widths = full["model_channels"], full["channel_mult"]
        classes, dropped = full["num_classes"], full["class_dropout_prob"] > 0
        agreeing(
            path,
            ("model_channels", channels, _shape(state, "time_embedding.linear_1.weight")[1]),
            ("in_channels", full["in_channels"], _shape(state, "conv_in.weight")[1]),
            ("levels of channel_mult", len(widths), _numbered(state, "down_blocks.")),
            ("num_res_blocks", full["num_res_blocks"], _numbered(state, "down_blocks.0.resnets.")),
            (
                "rows of the label table",
                classes + dropped if classes else 0,
                _shape(state, "class_embedding.weight")[0],
            ),
        )
        return model

    def resized(self, model: Mapping[str, Any], side: int, classes: int) -> dict[str, Any]:
        """Return the config of another side, which attends at the levels at which it did.

        An unconditional model stays one on a single class. On several it learns a label table, with
        a null row.
        """
        height = _height(model["input_size"])
        levels = [height // each for each in model["attention_resolutions"]]
        attending = [side // each for each in levels]
        if not model["num_classes"]:
            several = {"num_classes": classes, "class_dropout_prob": DROPPED}
            labels = several if classes > 1 else {}
        else:
            labels = {"num_classes": classes}
        return {**model, "input_size": side, "attention_resolutions": attending, **labels}

    def refit(self, before: Any, after: Any, names: Sequence[str], now: Sequence[str]) -> Refitted:
        """Give the new classes their rows of the label table; convolutions fit any size.

        The rows of a model that had no classes are zero, so that it begins as it was.
        """
        state, kept = dict(before.state_dict()), tuple(now)
        if not before.num_classes and not after.num_classes:
            return Refitted(state, (), {})
        if not before.num_classes:
            width = after.time_embedding.linear_2.out_features
            state[TABLE] = before.conv_in.weight.new_zeros(len(now) + 1, width)
            made = f"label table: of {len(now)} classes, with a null row; there was none"
            return Refitted(state, (), {TABLE: made})
        if tuple(now) == tuple(names):
            return Refitted(state, kept, {})
        null = "the null row is kept" if len(state[TABLE]) > len(names) else "no null row"
        state[TABLE], kept = relabelled(state[TABLE], names, now)
        made = f"label table of {len(names)} classes: now {len(now)}, {null}"
        return Refitted(state, kept, {TABLE: made})


def _height(size: Any) -> int:
    """Return the height of an ``input_size``, which is a number or a pair."""
    return int(size if isinstance(size, int) else size[0])


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return a weight's shape, zeros where there is none."""
    return (*state[name].shape, 0, 0) if name in state else (0, 0)


def _numbered(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many modules there are whose names are a prefix and a number."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )


CLASSIFIER_SOURCE = "openai/guided-diffusion's classifier, here under diffusers' names"


def _classifier_config() -> type[Classifier]:
    from sag_dit.models.unet.classifier import Classifier

    return Classifier


def read_classifier(file: WeightsFile) -> tuple[State, Classifier]:
    """Return the weights of one of ADM's classifiers, and its network without memory.

    Raises:
        ValueError: the file holds no classifier, or one that cannot be built.
    """
    if not is_published(file.state):
        raise ValueError(
            f"{file.path}: not a classifier of openai/guided-diffusion; found "
            f"{', '.join(list(file.state)[:3])}, ..."
        )
    converted = convert(file.state, file.path, file.stated, classifier=True)
    try:
        with unfilled():
            return converted.state, _classifier_config()(**converted.model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: {error}") from None


class Block(NamedTuple):
    """One of the published input_blocks: its width, and what it does beside convolving.

    Example:
        >>> Block(width=256, attends=True, resamples=False).width
        256
    """

    width: int
    attends: bool
    resamples: bool


@dataclass(frozen=True)
class Converted:
    """Weights under our names, and the config that goes with them.

    Example::

        converted = convert(state, Path("256x256_diffusion.pt"), stated={})
        print(converted.process, converted.model["num_classes"])
    """

    state: State
    model: Mapping[str, Any]
    process: Mapping[str, Any]


def sizes_of(state: Mapping[str, Tensor], path: Path) -> Sizes:
    """Read the sizes of a published UNet or classifier.

    Raises:
        ValueError: the weights fit none.
    """
    # One part after another is looked at; a foreign file lacks some.
    count = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")})
    try:
        blocks = [_block(state, i) for i in range(1, count)]
        model_channels = state["time_embed.0.weight"].shape[1]
        in_channels = state[FIRST].shape[1]
        norm = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        classifier = is_classifier(state)
        out = state["out.2.c_proj.weight" if classifier else "out.2.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path}: looks like a UNet of openai/guided-diffusion, but {error} is missing or of "
            f"another shape; expected all of its weights"
        ) from None
    # The number of residual blocks of a level is the one by which the parts fall into equal levels.
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
    # Each level is told by its first block.
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
    state: State, path: Path, stated: Mapping[str, Any], *, classifier: bool = False
) -> Converted:
    """Turn published weights into ours, with the config of the published model they are of.

    ``stated`` is a config that lies beside the file; what it says overrides what is inferred, and
    ``new_attention_order`` in it tells how queries, keys and values lie.

    Raises:
        ValueError: the weights are of another kind or variant than asked for, or nothing tells the
            size of the images and the heads.
    """
    # What it is, and which published model, if any.
    sizes = sizes_of(state, path)
    if is_classifier(state) != classifier:
        what, wanted = ("a classifier", "a diffusion model")[:: -1 if classifier else 1]
        raise ValueError(f"{path}: {what}, where {wanted} is expected; {resembling(sizes)}")
    network = _classifier_config() if classifier else UNetFamily().network()
    own = checked_arguments(network, stated.get("model", {}), path)
    found = asdict(sizes)
    agreeing(
        path,
        *(
            (name, _hashable(own[name]), found[name])
            for name in ("in_channels", "model_channels", "num_res_blocks", "channel_mult")
            if name in own
        ),
    )
    if classifier and "num_classes" in own:
        agreeing(path, ("num_classes", own["num_classes"], sizes.num_classes))
    variant = _variant(sizes, path, bool(own))
    if sizes.in_channels == 6:
        raise ValueError(
            f"{path}: an upsampler, which enlarges images and is not read; {resembling(sizes)}"
        )
    # What weights do not tell: of the published model, unless the config says otherwise.
    known: dict[str, Any] = {}
    process: Mapping[str, Any] = {}
    new_order = bool(stated.get(ORDER, False))
    if variant is not None:
        known = {"input_size": variant.input_size, **variant.arguments}
        process = variant.process
        new_order = bool(stated.get(ORDER, variant.new_attention_order))
    elif not classifier and "process" not in stated:
        log.warning(
            "%s: of no published size, and nothing tells how the model was trained; eps on DDPM's "
            'linear betas of 1000 steps is assumed. If that is wrong, state "process" and "kind" '
            "in %s beside it",
            path,
            path.with_suffix(".json").name,
        )
    if any(own.get(name) for name in HEADS):
        known = {name: value for name, value in known.items() if name not in HEADS}
    model = {**known, **own}
    _require_heads(model, path)
    height = _height(model["input_size"])
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
    # Names of the parts, theirs and ours, follow from the sizes.
    levels = len(sizes.channel_mult)
    where = (levels, sizes.num_res_blocks, [i in sizes.attending for i in range(levels)])
    parts = [*encoder_parts(*where), *([] if classifier else decoder_parts(*where))]
    heads, channels = (model.get(name) for name in HEADS)
    renamed = from_published(state, parts, heads, channels, new_order)
    return Converted(renamed, arguments, process)


def _variant(sizes: Sizes, path: Path, stated: bool) -> Variant | None:
    """Return the published model that a file holds, by its sizes and its name.

    Raises:
        ValueError: it has the name of one and the sizes of another, and no config explains it.
    """
    named, same = by_file(path.name), alike(sizes)
    if named in same:
        return named
    if named is not None and not stated:
        raise ValueError(
            f"{path}: not the published {named.file}: found "
            f"{sizes.differences(named.sizes)}; {resembling(sizes)}"
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
