"""How often an epoch shows the images of each class."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sag_dit.data.latents import LatentData
from sag_dit.data.training_batches import balanced
from tests.data.making import latent_folder


def test_balance_repeats_the_small_class(tmp_path: Path) -> None:
    root = latent_folder(tmp_path, (9,))  # five even ones, four odd ones
    labels = LatentData(root, 2, workers=0).labels
    assert balanced(np.arange(9), labels, 0.0).tolist() == list(range(9))
    few = np.array([0, 1, 2, 4, 6, 8])  # five and one
    assert np.bincount(labels[balanced(few, labels, 1.0)]).tolist() == [5, 5]
    assert np.bincount(labels[balanced(few, labels, 0.5)]).tolist() == [5, 2]
    with pytest.raises(ValueError, match=r"balance=2: expected 0 .* to 1"):
        balanced(few, labels, 2)
    shown = LatentData(root, 1, workers=0, balance=1.0, held_out=0.3)
    count = len(shown.training_images)
    every = torch.cat([labels for _, labels, _ in islice(shown.train_dataloader(), count)])
    assert every.bincount().tolist() == np.bincount(labels[shown.training_images])[:2].tolist()
