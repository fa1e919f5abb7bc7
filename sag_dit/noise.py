"""The randomness of image i: a pure function of (seed, index, step), drawn on the CPU.

Nothing else enters: not the batch, the rank, the device or what was drawn before. Philox is a
counter-based generator (Salmon et al. 2011), so every triple owns a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sag_dit.tensors import Images

START = 0
"""The draw that x_T is made of; step i of a sampler draws from stream i + 1."""


def check_key(name: str, value: int) -> None:
    """Refuse what cannot key a stream, such as a negative seed.

    Raises:
        ValueError: the value is not a whole number from 0 to 2^64 - 1.
    """
    if value != int(value) or not 0 <= value < 2**64:
        raise ValueError(f"{name}={value}: expected a whole number from 0 to 2^64 - 1")


def generator(seed: int, index: int, draw: int, purpose: int = 0) -> np.random.Generator:
    """Return the random stream of one (seed, index, draw); each ``purpose`` has its own.

    Raises:
        ValueError: a value is negative or needs more than 64 bits.
    """
    for name, value in {"seed": seed, "index": index, "draw": draw, "purpose": purpose}.items():
        check_key(name, value)
    key = np.array([seed, index], dtype=np.uint64)
    # The lowest word of the counter is left to count within the stream.
    counter = np.array([0, 0, purpose, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class NoiseSource:
    """Draws the noise of one batch of images, each from its own streams.

    Example:
        >>> source = NoiseSource(seeds=[0, 0], indices=[4, 5])
        >>> source.normal(0, (4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    seeds: Sequence[int]
    indices: Sequence[int]

    def normal(self, draw: int, shape: Sequence[int], purpose: int = 0) -> Images:
        """Return standard normal float32 noise of shape (b, *shape), on the CPU."""
        rows = [
            generator(seed, index, draw, purpose).standard_normal(tuple(shape), dtype=np.float32)
            for seed, index in zip(self.seeds, self.indices, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))

    def like(self, x: Images, step: int) -> Images:
        """Return the noise of one sampler step, on x's device and in its type."""
        return self.normal(step + 1, x.shape[1:]).to(x)

    def torch_generators(self, step: int) -> list[torch.Generator]:
        """Return one torch generator per image for code that draws its own noise."""
        generators = []
        for seed, index in zip(self.seeds, self.indices, strict=True):
            bits = generator(seed, index, step + 1, purpose=1).integers(2**63)
            generators.append(torch.Generator().manual_seed(int(bits)))
        return generators
