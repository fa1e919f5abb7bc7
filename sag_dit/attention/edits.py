"""Row-wise edits of named modules: how a perturbation reaches into a network.

An edit is an immutable value: two equal edits are one question to the network. It names a module
and changes, for some rows of a batch, what goes in, what comes out, or how it attends. Time
embeddings, blocks and attention layers are all modules, so these three kinds cover them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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

    def check(self, sequence: int) -> None:
        """Refuse a sequence whose tokens are not those of the grid.

        Raises:
            ValueError: it has others; ``tokens`` may say which are the image's.
        """
        height, width = self.grid
        found = len(range(*(self.tokens or slice(None)).indices(sequence)))
        if found != height * width:
            among = "" if self.tokens is None else f", of which tokens={self.tokens} are {found}"
            raise ValueError(
                f"layer {self.name!r}: it attends to {sequence} tokens{among}, and its "
                f"grid={self.grid} has {height * width}: expected an AttentionLayer whose "
                f"tokens=slice(START, STOP) are those of the grid"
            )


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
    rows: slice = field(default_factory=lambda: slice(None))
    kind: CaptureKind = "saliency"
    key: str = ""
    heads: int | None = None

    def __post_init__(self) -> None:
        if not self.key:
            key = capture_key(self.layer.name, self.kind, self.heads)
            object.__setattr__(self, "key", key)


def capture_key(layer: str, kind: CaptureKind, heads: int | None = None) -> str:
    """Return the usual name of what was read: the layer's for saliency, ``layer:map`` for maps.

    Example:
        >>> capture_key("blocks.3.attn", "saliency"), capture_key("blocks.3.attn", "map")
        ('blocks.3.attn', 'blocks.3.attn:map')
    """
    name = layer if kind == "saliency" else f"{layer}:map"
    return name if heads is None else f"{name}:{heads} heads"


class Attend(Protocol):
    """Fused attention with the call's own mask and scale: (query, key, value) -> output.

    ``allowed`` further restricts it to the pairs (query, key) that are true.

    Example::

        def edit_attention(self, query, key, value, attend: Attend):
            return attend(query * 0.5, key, value)
    """

    def __call__(
        self,
        query: Float[Tensor, "r k n e"],
        key: Float[Tensor, "r k n e"],
        value: Float[Tensor, "r k n e"],
        allowed: Bool[Tensor, "n n"] | None = None,
    ) -> Float[Tensor, "r k n e"]:
        """Attend."""


@dataclass(frozen=True)
class Edit:
    """The base of all edits; ``module`` is the dotted name of a module of the network.

    Example:
        >>> Edit("blocks.5") == Edit("blocks.5")
        True
    """

    module: str


class InputEdit(Edit, ABC):
    """Changes the first input of a module.

    Example::

        @dataclass(frozen=True)
        class Halved(InputEdit):
            def edit_input(self, x: Tensor) -> Tensor:
                return x / 2
    """

    @abstractmethod
    def edit_input(self, x: Float[Tensor, "r ..."]) -> Float[Tensor, "r ..."]:
        """Return what the module sees instead of ``x``, for the edited rows."""


class OutputEdit(Edit, ABC):
    """Changes the output of a module.

    Example::

        @dataclass(frozen=True)
        class Skipped(OutputEdit):
            def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
                return x
    """

    @abstractmethod
    def edit_output(
        self, x: Float[Tensor, "r ..."], output: Float[Tensor, "r ..."]
    ) -> Float[Tensor, "r ..."]:
        """Return what follows sees instead of ``output``; ``x`` is the module's first input."""


class AttentionEdit(Edit, ABC):
    """Changes the fused attention called within a module.

    Example::

        @dataclass(frozen=True)
        class Cooler(AttentionEdit):
            def edit_attention(
                self, query: Tensor, key: Tensor, value: Tensor, attend: Attend
            ) -> Tensor:
                return attend(query * 2, key, value)
    """

    @abstractmethod
    def edit_attention(
        self,
        query: Float[Tensor, "r k n e"],
        key: Float[Tensor, "r k n e"],
        value: Float[Tensor, "r k n e"],
        attend: Attend,
    ) -> Float[Tensor, "r k n e"]:
        """Return the attention output of the edited rows."""


def attending(edit: AttentionEdit, before: Attend) -> Attend:
    """Return attention with one more edit, whose ``allowed`` also restricts the edits before it."""

    def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        outer = allowed

        def within(
            query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
        ) -> Tensor:
            return before(query, key, value, both(outer, allowed))

        return edit.edit_attention(query, key, value, within)

    return attend


def both(mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """Return a mask that also forbids what is not allowed; it is boolean or added to the logits."""
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)
