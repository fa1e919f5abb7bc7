"""Verifiers as metrics: the mean of what a function, or a network, says of each image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchmetrics import Metric

from sag_dit.evaluation.features import exact
from sag_dit.evaluation.kinds import MetricKind
from sag_dit.evaluation.metrics import Groups, group_of, summed, total
from sag_dit.evaluation.scores import Verifier, scores_of
from sag_dit.tensors import Labels


class MeanScore(Metric):
    """The mean of a verifier's scores, as a sum over images.

    :func:`verified` makes the class of one verifier.

    Example:
        >>> metric = verified("brightness", lambda images, _: images.mean((1, 2, 3))).metric()
        >>> metric.update(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(2))
        >>> metric.value()
        1.0
    """

    full_state_update = True
    verifier: ClassVar[Any]
    sums: Tensor

    def __init__(self, groups: int = 1, period: int = 1) -> None:
        super().__init__(dist_sync_fn=summed)
        self.groups, self.period = groups, period
        self.add_state("sums", torch.zeros(groups, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, images: UInt8[Tensor, "b c h w"], indices: Labels, condition: Any = None
    ) -> None:
        """Add images by their indices.

        Raises:
            ValueError: the verifier returns something else than a finite number for each image.
        """
        name = type(self).__name__
        with exact(images.device):
            scores = scores_of(self.verifier, images.float() / 255, condition, name)
        bad = indices[~scores.isfinite().to(indices.device)].tolist()
        if bad:
            raise ValueError(
                f"{name} returned NaN or infinity for {len(bad)} images, indices {bad[:5]}: "
                f"expected finite scores; look at these images"
            )
        rows = torch.stack([scores, torch.ones_like(scores)], 1).to(self.sums)
        group = group_of(indices, self.groups, self.period).to(rows.device)
        self.sums.index_add_(0, group, rows)

    def compute(self) -> Tensor:
        """Return the mean score.

        Raises:
            ValueError: there are no images.
        """
        return self.sums.new_tensor(self.value())

    def value(self, groups: Groups = None) -> float:
        """Return the mean score of some groups, of this rank or, while synced, of all."""
        score, count = total(self.sums, groups)
        if not count:
            raise ValueError("0 images: expected 1 or more")
        return float(score / count)


def verified(name: str, verifier: Verifier) -> MetricKind:
    """Return the metric of a verifier; more is better unless it says ``higher_is_better`` itself.

    Raises:
        ValueError: it cannot be called.

    Example:
        >>> verified("brightness", lambda images, condition: images.mean((1, 2, 3))).label
        'brightness'
    """
    if not callable(verifier):
        raise ValueError(
            f"verifiers.{name}: {type(verifier).__name__} cannot be called; expected a function or "
            f"module that takes (images, condition) and returns a score for each image"
        )
    better = getattr(verifier, "higher_is_better", True)
    known = {"verifier": staticmethod(verifier), "higher_is_better": better}
    return MetricKind(type(name, (MeanScore,), known), getattr(verifier, "label", name), "images")
