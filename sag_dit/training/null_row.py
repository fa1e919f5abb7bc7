"""Whether a network learns what 'no class' is, which classifier-free guidance asks it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sag_dit.models import Network, family_for
from sag_dit.raised import is_ours

STEPS, IMAGES = 100, 1_000
"""So many steps, and images on each rank, are looked at."""


class NullRow:
    """Watches the row of ``null_label`` in a network's label tables: whether it gets a gradient.

    Looked at is a network of one's own; those of this package drop labels by themselves. A label
    table is what has a row more for one class more. Where there is none, or a gradient cannot be
    read by rows, such as a sparse one, nothing is told. What the steps find stays on the device
    until the last of them.

    Example:
        >>> from sag_dit.models import DiT
        >>> NullRow(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)).done
        True
    """

    def __init__(self, network: Network) -> None:
        self._network, self._steps, self._images = network, 0, 0
        self._rows = _tables(network)
        self._null_label = 0 if network.null_label is None else network.null_label
        self._null: Any = False
        self._others: Any = False

    @property
    def done(self) -> bool:
        """Whether there is nothing more to look at."""
        return not self._rows or self._seen_enough()

    def _seen_enough(self) -> bool:
        return self._steps >= STEPS and self._images >= IMAGES

    def look(self, images: int) -> str:
        """Look at the gradients of a step, and return what is wrong once that is sure."""
        if self.done:
            return ""
        self._steps, self._images = self._steps + 1, self._images + images
        null = self._null_label
        for table, dimension in self._rows.values():
            gradient = table.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                self._rows = {}
                return ""
            of_null = gradient.select(dimension, null).any()
            self._null = self._null | of_null
            self._others = self._others | (gradient.count_nonzero() > 0) & ~of_null
        if not self._seen_enough() or bool(self._null) or not bool(self._others):
            return ""
        kind = type(self._network)
        return (
            f"{kind.__module__}.{kind.__qualname__}: row {null} (its null_label) of "
            f"{' and '.join(self._rows)} has had no gradient in {self._steps} steps of "
            f"{self._images:,} images, as if none had been without its class; guidance away from "
            f"no class (CFG) then means nothing: expected a forward that drops labels while it "
            f"trains, as Backbone.drop_labels does, or null_label=None"
        )


def _tables(network: Network) -> dict[str, tuple[Tensor, int]]:
    """Return the trained label tables with a row for 'no class', and the dimension of its rows."""
    null = network.null_label
    if null is None or is_ours(type(network)):
        return {}
    try:
        found = family_for(network).label_tables(network)
    except Exception:  # A network that cannot be built once more is not looked at.
        return {}
    trained = {name: each for name, each in network.named_parameters() if each.requires_grad}
    # A row that stays zero on purpose has no gradient either.
    zero = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx == null
    }
    return {
        name: (trained[name], dimension)
        for name, dimension in found.items()
        if name in trained and name not in zero and trained[name].shape[dimension] > null
    }
