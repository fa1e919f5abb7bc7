"""FDr: Fréchet distances by several networks, each as a multiple of a real split's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torchmetrics import Metric

from sag_dit.evaluation.features import FeatureExtractor, exact
from sag_dit.evaluation.kinds import measured
from sag_dit.evaluation.metrics import FrechetDistance, Groups, Statistics, frechet_distance
from sag_dit.evaluation.reference import Reference, description_of
from sag_dit.tensors import Labels


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """One network, what it says of the reference, and how far from that a real split is.

    ``told`` is all that changes a number, as plain JSON values.

    Example::

        FeatureSpace.of(extractor, load_reference("a/", extractor), load_reference("b/", extractor))
    """

    extractor: FeatureExtractor
    reference: Statistics
    real: float
    told: Mapping[str, Any]

    @classmethod
    def of(
        cls, extractor: FeatureExtractor, reference: Reference, split: Reference
    ) -> FeatureSpace:
        """Return the space of a network from its statistics of the reference and the split.

        Raises:
            ValueError: statistics are missing, or the split does not differ from the reference.
        """
        if reference.pool is None or split.pool is None:
            raise ValueError(f"{extractor.name}: expected pooled features of both sets")
        real = frechet_distance(split.pool, reference.pool)
        if real <= 1e-9 * float(reference.pool.covariance.trace()):
            raise ValueError(
                f"{split.name} is as far as {real:.1g} from {reference.name} by {extractor.name}: "
                f"expected real images that the reference does not hold"
            )
        told = {"network": description_of(extractor), "split": split.name, "fd": real}
        return cls(extractor, reference.pool, real, told)


@measured(
    "fdr",
    "FDr",
    "images",
    reference="spaces",
    needs="fdr.features=[NAME,NAME] of evaluate.py, and fdr.split, real images that the reference "
    "does not hold",
    tells="FD by several networks, each over the FD of a real split, on average: 1 for real "
    "images, and pleasing one network is not enough",
    cost="as fid, with a pass of each network",
    source="[Yang 2026](https://github.com/Jiawei-Yang/FD-loss)",
)
class FrechetRatio(Metric):
    """The mean over networks of the Fréchet distance, divided by that of a real split.

    FDr-6 by Inception, ConvNeXt, DINOv2, MAE, SigLIP and CLIP with ImageNet's validation images.

    Raises:
        ValueError: there are no spaces.

    Source: Jiawei-Yang/FD-loss, eval_all_fds.py.

    Example::

        metric = FrechetRatio([FeatureSpace.of(each, real(each), split(each)) for each in networks])
        metric.update(images, torch.arange(len(images)))
    """

    full_state_update = True
    higher_is_better = False

    def __init__(self, spaces: Sequence[FeatureSpace], groups: int = 1, period: int = 1) -> None:
        super().__init__()
        if not spaces:
            raise ValueError("no spaces: expected one or more")
        self.spaces = tuple(spaces)
        self._distances = nn.ModuleList(
            FrechetDistance(each.reference, groups, period) for each in spaces
        )

    @property
    def distances(self) -> list[FrechetDistance]:
        """The distance of each network, which holds its sums."""
        return cast(list[FrechetDistance], [*self._distances])

    def update(
        self, images: UInt8[Tensor, "b c h w"], indices: Labels, condition: object = None
    ) -> None:
        """Add images by their indices; every network looks at them, wherever they lie."""
        for space, distance in zip(self.spaces, self.distances, strict=True):
            with exact(images.device):
                distance.update(space.extractor(images).pool, indices)

    def compute(self) -> Tensor:
        """Return the ratio.

        Raises:
            ValueError: there are fewer than two images.
        """
        return torch.tensor(self.value(), dtype=torch.float64)

    def value(self, groups: Groups = None) -> float:
        """Return the ratio of some groups, of this rank or, while synced, of all."""
        pairs = zip(self.spaces, self.distances, strict=True)
        return sum(each.value(groups) / space.real for space, each in pairs) / len(self.spaces)

    @contextmanager
    def sync_context(self, *_: Any, **__: Any) -> Iterator[None]:
        """Sync the distances, which hold all states."""
        with ExitStack() as stack:
            for each in self.distances:
                stack.enter_context(each.sync_context(dist_sync_fn=each.dist_sync_fn))
            yield

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        for each in self.distances:
            each.reset()
