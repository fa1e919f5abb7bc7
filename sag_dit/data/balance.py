"""How often an epoch shows the images of each class."""

from __future__ import annotations

import numpy as np

from sag_dit.data.training_batches import Indices


def balanced(chosen: Indices, labels: Indices, balance: float) -> Indices:
    """Repeat the images of small classes: round((n_max / n)^balance) times in a class of n.

    n_max is the size of the largest class: with 0 every image comes once, with 1 all classes are
    about equally frequent.

    Raises:
        ValueError: ``balance`` is not from 0 to 1.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance={balance}: expected 0 (every image once) to 1 (classes alike)")
    if balance == 0:
        return chosen
    counts = np.bincount(labels[chosen])
    times = np.rint((counts.max() / np.maximum(counts, 1)) ** balance).astype(np.int64)
    return np.repeat(chosen, times[labels[chosen]])
