"""Equality but for rounding, which differs from processor to processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_near(
    found: Tensor, expected: Tensor, within: float = 2e-5, *, scale: Tensor | None = None
) -> None:
    """No number is farther off than ``within`` of the largest expected one, or of ``scale``.

    A network adds large numbers up to small ones, so that what rounding costs a result is of the
    size of its neighbours, not of its own. ``scale`` is what was computed on the way, where that is
    larger than the result: a small difference of two predictions carries the rounding of both.
    """
    size = (expected if scale is None else scale).detach().abs().amax().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=within * size)


def places_are_alike(network: nn.Module, *inputs: Tensor, rows: int) -> bool:
    """Whether this processor computes the same at every place of a batch of so many, bit for bit.

    ``inputs`` are those of one image. What is left over of a library's blocks may be computed in
    another way than the rest: rows of a product by MKL on AVX2, numbers of a SiLU on AVX-512.
    """
    out = network(*(each.expand(rows, *each.shape[1:]).contiguous() for each in inputs))
    return all(torch.equal(row, out[0]) for row in out)
