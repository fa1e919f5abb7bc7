"""A network small enough to follow, and sets of images to show it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sag_dit.evaluation.features import FeatureExtractor, Features
from sag_dit.evaluation.reference import Reference, load_reference
from sag_dit.tensors import home_of_doubles


class Tiny(FeatureExtractor):
    """One matrix: 16 pooled values, 6 spatial ones, logits of 10 classes."""

    name = "tiny"

    def __init__(self, *, spatial: bool = True, logits: bool = True, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(64, 16, generator=random) / 8)
        self.head = nn.Parameter(torch.randn(16, 10, generator=random) * 3)
        self.spatial, self.logits = spatial, logits
        self.protocol = {"weights": f"seed {seed}", "range": "x / 255"}

    def forward(self, images: Tensor) -> Features:
        # Rounded from float64, so that an image has the same features in every batch: a product in
        # float32 depends, on some processors, on how many rows it has.
        home = home_of_doubles(images.device)
        pixels, weight, head = (
            each.to(home).double() for each in (images.flatten(1), self.weight, self.head)
        )
        pool = (pixels / 255 @ weight).abs()
        shown, logits = pool.float().to(images.device), (pool @ head).float().to(images.device)
        return Features(
            shown, shown[:, 10:] if self.spatial else None, logits if self.logits else None
        )


def pixels(count: int, seed: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    """Uint8 images of noise, darker ones for larger seeds."""
    random = np.random.Generator(np.random.Philox(key=[seed, 1]))
    images = random.integers(0, 256 - 20 * seed, (count, *shape), dtype=np.uint8)
    return torch.from_numpy(images)


def reference_of(extractor: FeatureExtractor, count: int = 120, seed: int = 0) -> Reference:
    """A reference of noise, all of one class."""
    labels = torch.zeros(count, dtype=torch.long)
    return load_reference((pixels(count, seed), labels), extractor, cache=None)
