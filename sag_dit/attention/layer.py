"""Self-attention layers by name, and wishes to read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sag_dit.attention.block_io import Rows

CaptureKind = Literal["saliency", "map"]
Span = tuple[int | None, int | None]
"""Start and stop of a slice, which unlike a slice can be hashed."""


@dataclass(frozen=True)
class AttentionLayer:
    """A self-attention layer: its module's dotted name and where the image's tokens are.

    ``grid`` is the (height, width) of the image's tokens, row-major. ``tokens`` is their slice of
    the sequence, None where the sequence holds nothing else.

    Example:
        >>> AttentionLayer("blocks.0.attn", grid=(16, 16), tokens=slice(77, 333)).span
        (77, 333)
    """

    name: str
    grid: tuple[int, int]
    tokens: slice | None = None

    @property
    def span(self) -> Span | None:
        """Where the image's tokens are, as an edit can hold it."""
        return None if self.tokens is None else (self.tokens.start, self.tokens.stop)


@dataclass(frozen=True)
class Capture:
    """A wish to read one layer for some rows of the batch: its saliency or its full map.

    ``key`` names what was read in the answer; left out, it is :func:`capture_key`. ``heads`` reads
    the layer's channels as if it had so many heads, see :func:`regrouped`.

    Example:
        >>> Capture(AttentionLayer("blocks.0.attn", (16, 16)), kind="map").key
        'blocks.0.attn:map'
    """

    layer: AttentionLayer
    rows: Rows = field(default_factory=lambda: slice(None))
    kind: CaptureKind = "saliency"
    key: str = ""
    heads: int | None = None

    def __post_init__(self) -> None:
        if not self.key:
            key = capture_key(self.layer.name, self.kind, self.heads)
            object.__setattr__(self, "key", key)


def capture_key(layer: str, kind: CaptureKind, heads: int | None = None) -> str:
    """Return the usual name of what was read: the layer's for saliency, ``layer:map`` for maps."""
    name = layer if kind == "saliency" else f"{layer}:map"
    return name if heads is None else f"{name}:{heads} heads"
