"""The contract of a set of images: uint8, in one order, read in shares by several ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from jaxtyping import UInt8
from torch import Tensor

from sag_dit.tensors import Labels

ImageBatch: TypeAlias = tuple[UInt8[Tensor, "b c h w"], Labels]


class ImageSet(ABC):
    """Images in one order, each with an index of its own.

    ``protocol`` says, as plain JSON values, what was done to them before they are read.

    Example::

        images = open_images("digits:report")
        print(len(images), images.shape, images.balance())
    """

    name: str
    protocol: Mapping[str, Any]

    @property
    @abstractmethod
    def labels(self) -> list[int] | None:
        """The class of every image, None if it is not known."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many images there are."""

    @abstractmethod
    def read(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """Yield (images, indices) of one rank's share, consecutive images, in their order."""

    @abstractmethod
    def digest(self) -> str:
        """Return a sha256 over all that is read."""

    def balance(self) -> dict[str, int] | None:
        """Return how many classes there are, and how many images the smallest and largest have."""
        if self.labels is None:
            return None
        counts = Counter(self.labels).values()
        return {"classes": len(counts), "fewest": min(counts), "most": max(counts)}


def share(count: int, rank: int, world: int) -> range:
    """Return a rank's consecutive places; how many each rank has differs by one at most."""
    return range(count * rank // world, count * (rank + 1) // world)
