"""The UNets and classifiers that openai/guided-diffusion and openai/improved-diffusion published.

Weights tell a UNet's widths, depth and classes, but neither the size of its images nor its heads,
schedule or times: these are known by the published model that has the same sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from sag_dit.catalogue import Kind, entries

ORDER = "new_attention_order"
"""The key of a config beside published weights that tells how queries, keys and values lie."""


@dataclass(frozen=True)
class Sizes:
    """What weights tell of a UNet or, with ``learn_sigma`` None, of a classifier.

    ``attending`` are the levels that attend, 0 being the input's.
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
