"""Groups of images: the parts from which random halves of a set are put together.

A metric keeps its sums once for each group, so that its value on any union of groups is known
without a second look at the images. Its spread over random halves estimates the standard error of
its value on the whole set (the delete-half jackknife): for halves no rescaling is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sag_dit.tensors import Labels

Groups = Sequence[int] | None
"""Some groups, or None for all of them."""

# Odd constants of SplitMix64, as signed numbers.
_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687


def group_of(indices: Labels, groups: int, period: int = 1) -> Labels:
    """Return each image's group, 0 to ``groups`` - 1, a function of its index alone.

    The indices are cut into runs of ``period`` images. Of each ``groups`` runs in a row every one
    goes to another group, in an order that differs from one such block to the next. So where the
    classes recur with ``period``, every group has the same number of images of each class.
    """
    run = indices.long() // period
    mixed = (run // groups + 1) * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX
    return (run + (mixed >> 33)) % groups


def halves(groups: int, repeats: int, seed: int) -> list[list[int]]:
    """Draw ``repeats`` random halves of the groups.

    Raises:
        ValueError: there are too few groups or repeats to estimate a spread.
    """
    if groups < 4 or groups % 2:
        raise ValueError(f"groups={groups}: expected an even number of 4 or more groups of images")
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: expected 2 or more")
    random = np.random.Generator(np.random.Philox(key=[seed, groups]))
    return [sorted(random.permutation(groups)[: groups // 2].tolist()) for _ in range(repeats)]


def total(state: Tensor, groups: Groups) -> Tensor:
    """Sum a state (groups, ...) over some of its groups."""
    if len(state) == 1 and groups is None:
        return state[0]
    return (state if groups is None else state[torch.as_tensor(groups)]).sum(0)
