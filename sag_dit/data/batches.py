"""Training batches as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from sag_dit.noise import generator

SHUFFLE = 2
"""Purpose of the random streams that order the data, see :func:`sag_dit.noise.generator`."""


class StepBatches(Sampler[list[int]]):
    """An endless sampler of batches of indices.

    The data is one endless sequence of shuffled epochs; step s of a world of w ranks takes the next
    w * batch_size positions from s * w * batch_size on, and each rank its contiguous part. So the
    batch depends on nothing but (seed, step): not on workers, and not on where a run was resumed.

    Raises:
        ValueError: there is no data, or a batch is larger than the data.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        seed: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 < batch_size * world <= items:
            raise ValueError(
                f"batch_size={batch_size} on {world} ranks: expected from 1 to {items} images in "
                f"all, the number there are"
            )
        self._items, self._batch_size, self._seed = items, batch_size, seed
        self._first, self._rank, self._world = first, rank, world
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the data in one epoch."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = generator(self._seed, epoch, 0, SHUFFLE).permutation(self._items)
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first
        while True:
            start = (step * self._world + self._rank) * self._batch_size
            epoch, offset = divmod(start, self._items)
            part = self.order(epoch)[offset : offset + self._batch_size]
            if len(part) < self._batch_size:
                rest = self.order(epoch + 1)[: self._batch_size - len(part)]
                part = np.concatenate([part, rest])
            yield part.tolist()
            step += 1
