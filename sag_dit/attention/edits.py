"""Row-wise edits of named modules: how a perturbation reaches into a network.

An edit is an immutable value: two equal edits are one question to the network. It names a module
and changes, for some rows of a batch, what goes in, what comes out, or how it attends. Time
embeddings, blocks and attention layers are all modules, so these three kinds cover them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Fused attention with the call's own mask and scale: (query, key, value) -> output."""


@dataclass(frozen=True)
class Edit:
    """The base of all edits; ``module`` is the dotted name of a module of the network."""

    module: str


class InputEdit(Edit, ABC):
    """Changes the first input of a module."""

    @abstractmethod
    def edit_input(self, x: Float[Tensor, "r ..."]) -> Float[Tensor, "r ..."]:
        """Return what the module sees instead of ``x``, for the edited rows."""


class OutputEdit(Edit, ABC):
    """Changes the output of a module."""

    @abstractmethod
    def edit_output(
        self, x: Float[Tensor, "r ..."], output: Float[Tensor, "r ..."]
    ) -> Float[Tensor, "r ..."]:
        """Return what follows sees instead of ``output``; ``x`` is the module's first input."""


class AttentionEdit(Edit, ABC):
    """Changes the fused attention called within a module."""

    @abstractmethod
    def edit_attention(
        self,
        query: Float[Tensor, "r k n e"],
        key: Float[Tensor, "r k n e"],
        value: Float[Tensor, "r k n e"],
        attend: Attend,
    ) -> Float[Tensor, "r k n e"]:
        """Return the attention output of the edited rows."""
