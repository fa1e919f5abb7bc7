"""Levels and parts of the UNets of ADM and IDDPM: which module is which of the published code.

By :func:`encoder_parts` and :func:`decoder_parts` published weights are converted, and attention
layers are known under both names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

GROUPS = 32
"""Groups of every normalisation; widths are multiples of it."""


@dataclass(frozen=True)
class Part:
    """One module: its name here, its name in the published code, its kind and its level.

    Level 0 has the input's size, and each further one half of it.

    Example:
        >>> part = next(encoder_parts(levels=2, num_res_blocks=1, attending=[False, True]))
        >>> part.name, part.published
        ('down_blocks.0.resnets.0', 'input_blocks.1.0')
    """

    name: str
    published: str
    kind: Literal["resnet", "attention", "resample"]
    level: int


def encoder_parts(levels: int, num_res_blocks: int, attending: Sequence[bool]) -> Iterator[Part]:
    """Yield the parts from the input down to the middle, in the order of their evaluation."""
    index = 1  # input_blocks.0 is the first convolution
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for i in range(num_res_blocks):
            yield Part(f"{ours}.resnets.{i}", f"input_blocks.{index}.0", "resnet", level)
            if attending[level]:
                yield Part(f"{ours}.attentions.{i}", f"input_blocks.{index}.1", "attention", level)
            index += 1
        if level < levels - 1:
            yield Part(f"{ours}.downsamplers.0", f"input_blocks.{index}.0", "resample", level)
            index += 1
    last = levels - 1
    yield Part("mid_block.resnets.0", "middle_block.0", "resnet", last)
    yield Part("mid_block.attentions.0", "middle_block.1", "attention", last)
    yield Part("mid_block.resnets.1", "middle_block.2", "resnet", last)


def decoder_parts(levels: int, num_res_blocks: int, attending: Sequence[bool]) -> Iterator[Part]:
    """Yield the parts from the middle up to the output, in the order of their evaluation."""
    index = 0
    for level in reversed(range(levels)):
        ours = f"up_blocks.{levels - 1 - level}"
        for i in range(num_res_blocks + 1):
            theirs = f"output_blocks.{index}"
            yield Part(f"{ours}.resnets.{i}", f"{theirs}.0", "resnet", level)
            if attending[level]:
                yield Part(f"{ours}.attentions.{i}", f"{theirs}.1", "attention", level)
            if level and i == num_res_blocks:
                place = 1 + attending[level]
                yield Part(f"{ours}.upsamplers.0", f"{theirs}.{place}", "resample", level)
            index += 1


@dataclass(frozen=True)
class Shape:
    """What a UNet and a classifier have in common: sizes of their levels, checked.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> shape = Shape((16, 16), 32, (1, 2), (8,), num_heads=4, num_head_channels=None)
        >>> shape.widths, shape.grids, shape.attending
        ((32, 64), ((16, 16), (8, 8)), (False, True))
    """

    size: tuple[int, int]
    model_channels: int
    channel_mult: tuple[float, ...]
    attention_resolutions: tuple[int, ...]
    num_heads: int | None
    num_head_channels: int | None

    def __post_init__(self) -> None:
        # The image can be halved as often as there are levels.
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.size[0] % factor or self.size[1] % factor:
            raise ValueError(
                f"input_size={self.size}: expected multiples of {factor}, since each of the "
                f"{len(self.channel_mult)} levels halves the one before"
            )
        # Every normalisation splits its channels into groups.
        odd = [width for width in self.widths if width % GROUPS or width == 0]
        if odd:
            raise ValueError(
                f"model_channels={self.model_channels}, channel_mult={self.channel_mult}: "
                f"expected widths that are multiples of {GROUPS}, found {odd[0]}"
            )
        # A level that is to attend exists, and its width is a whole number of heads.
        heights = [height for height, _ in self.grids]
        absent = [side for side in self.attention_resolutions if side not in heights]
        if absent:
            raise ValueError(
                f"attention_resolutions={self.attention_resolutions}: no level is {absent[0]} "
                f"high; expected some of {', '.join(map(str, heights))}"
            )
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError(
                f"num_heads={self.num_heads}, num_head_channels={self.num_head_channels}: "
                f"expected one of them, and null for the other"
            )
        parts = self.num_heads or self.num_head_channels or 1
        attended = [
            width
            for level, width in enumerate(self.widths)
            if self.attending[level] or level == len(self.widths) - 1
        ]
        if any(width % parts for width in attended):
            name = "num_heads" if self.num_heads else "num_head_channels"
            raise ValueError(
                f"{name}={parts}: expected a divisor of the widths that attend, "
                f"{', '.join(map(str, dict.fromkeys(attended)))}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(int(factor * self.model_channels) for factor in self.channel_mult)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every level."""
        height, width = self.size
        return tuple((height >> i, width >> i) for i in range(len(self.channel_mult)))

    @property
    def attending(self) -> tuple[bool, ...]:
        """Whether each level attends beside its residual blocks; the middle always does."""
        return tuple(height in self.attention_resolutions for height, _ in self.grids)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
