"""The randomness of image i: a pure function of (seed, index, step), drawn on the CPU.

Nothing else enters: not the batch, the rank, the device or what was drawn before. Philox is a
counter-based generator (Salmon et al. 2011), so every triple owns a stream of its own. A search
draws an image several times: each of these particles has streams of its own as well, and those of
particle 0 are the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from sag_dit.tensors import Images, sent

START = 0
"""The draw that x_T is made of; step i of a sampler draws from stream i + 1."""

Lineage: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs (draw, particle), in ascending order: from this draw on, noise is this particle's."""
ALONE: Lineage = ((START, 0),)
"""The noise of an image that nobody searches for."""


def check_key(name: str, value: int) -> None:
    """Refuse what cannot key a stream, such as a negative seed.

    Raises:
        ValueError: the value is not a whole number from 0 to 2^64 - 1.
    """
    if value != int(value) or not 0 <= value < 2**64:
        raise ValueError(f"{name}={value}: expected a whole number from 0 to 2^64 - 1")


def generator(
    seed: int, index: int, draw: int, purpose: int = 0, particle: int = 0
) -> np.random.Generator:
    """Return the random stream of one (seed, index, draw).

    Each ``purpose`` and each ``particle`` has its own.

    Raises:
        ValueError: a value is negative or needs more than 64 bits.
    """
    named = {"seed": seed, "index": index, "draw": draw, "purpose": purpose, "particle": particle}
    for name, value in named.items():
        check_key(name, value)
    key = np.array([seed, index], dtype=np.uint64)
    # The lowest word of the counter is left to count within the stream.
    counter = np.array([0, particle, purpose, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def particle_at(lineage: Lineage, draw: int) -> int:
    """Return whose noise a draw is made of.

    Example:
        >>> [particle_at(((0, 2), (5, 0)), draw) for draw in (0, 4, 5, 9)]
        [2, 2, 0, 0]
    """
    return next(particle for since, particle in reversed(lineage) if since <= draw)


@dataclass(frozen=True)
class NoiseSource:
    """Draws the noise of one batch of images, each from its own streams.

    ``lineages`` says which particle's these are; left out, they are the images' own.

    Example:
        >>> source = NoiseSource(seeds=[0, 0], indices=[4, 5])
        >>> source.normal(0, (4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    seeds: Sequence[int]
    indices: Sequence[int]
    lineages: Sequence[Lineage] = field(default=())

    def _streams(self, draw: int, purpose: int) -> list[np.random.Generator]:
        lineages = self.lineages or [ALONE] * len(self.seeds)
        return [
            generator(seed, index, draw, purpose, particle_at(lineage, draw))
            for seed, index, lineage in zip(self.seeds, self.indices, lineages, strict=True)
        ]

    def normal(self, draw: int, shape: Sequence[int], purpose: int = 0) -> Images:
        """Return standard normal float32 noise of shape (b, *shape), on the CPU."""
        rows = [
            stream.standard_normal(tuple(shape), dtype=np.float32)
            for stream in self._streams(draw, purpose)
        ]
        return torch.from_numpy(np.stack(rows))

    def like(self, x: Images, step: int) -> Images:
        """Return the noise of one sampler step, on x's device and in its type."""
        return sent(self.normal(step + 1, x.shape[1:]), x.device, x.dtype)

    def torch_generators(self, step: int) -> list[torch.Generator]:
        """Return one torch generator per image for code that draws its own noise."""
        return [
            torch.Generator().manual_seed(int(stream.integers(2**63)))
            for stream in self._streams(step + 1, purpose=1)
        ]
