"""How many pixels an image file may promise."""

from __future__ import annotations

FREE = 1 << 24
"""Pixels that any file may hold."""
PER_BYTE = 1000
"""Pixels for each byte of a larger image; only an image of one colour has more."""


def check_pixels(size: tuple[int, int], content: int) -> None:
    """Refuse an image of more pixels than a file of ``content`` bytes can mean.

    Raises:
        ValueError: it has more.
    """
    pixels = size[0] * size[1]
    if pixels > max(FREE, PER_BYTE * content):
        raise ValueError(
            f"{size[0]} x {size[1]} pixels in {content:,} bytes: expected at most {PER_BYTE:,} "
            f"for each byte"
        )
