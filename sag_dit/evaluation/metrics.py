"""FID, sFID and the Inception Score as sums over images, in float64, added up over ranks.

Each metric is torchmetrics' ``Metric``. None keeps images or, precision and recall apart, features:
a sum does not depend on the order or the batches in which images come, nor on the rank they come
to. With ``groups`` above 1 the sums are kept apart by group, see :mod:`sag_dit.evaluation.subsets`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from sag_dit.evaluation.distributed import padded, summed
from sag_dit.evaluation.precision_recall import PrecisionRecall
from sag_dit.evaluation.statistics import Statistics, frechet_distance
from sag_dit.evaluation.subsets import Groups, group_of, total
from sag_dit.tensors import Labels

__all__ = ["FrechetDistance", "InceptionScore", "Moments", "PrecisionRecall"]


class Moments(Metric):
    """Mean and covariance of vectors: n, sum x and sum x x^T, (1 + d + d^2) numbers a group.

    Raises:
        ValueError: ``groups`` or ``period`` is below 1.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[0.0], [2.0]]))
        >>> float(moments.statistics().mean)
        1.0
    """

    full_state_update = True
    number: Tensor
    sums: Tensor
    products: Tensor

    def __init__(self, groups: int = 1, period: int = 1) -> None:
        super().__init__(dist_sync_fn=summed)
        if groups < 1 or period < 1:
            raise ValueError(f"groups={groups}, period={period}: expected 1 or more")
        self.groups, self.period = groups, period
        # The width is known with the first features; a rank without any keeps these.
        states = {"number": (groups,), "sums": (groups, 0), "products": (groups, 0, 0)}
        for name, shape in states.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "b d"], indices: Labels | None = None) -> None:
        """Add vectors; ``indices`` (b) are needed where there are groups.

        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        rows = _checked("features", features, self.sums.shape[1]).to(self.sums)
        if not self.sums.shape[1]:
            width = rows.shape[1]
            self.sums = self.sums.new_zeros(self.groups, width)
            self.products = self.sums.new_zeros(self.groups, width, width)
        if self.groups == 1:
            self._add(0, rows)
            return
        if indices is None:
            raise ValueError(f"groups={self.groups}: expected the images' indices beside features")
        group = group_of(indices.to(rows.device), self.groups, self.period)
        for each in group.unique().tolist():
            self._add(each, rows[group == each])

    def _add(self, group: int, rows: Tensor) -> None:
        self.number[group] += len(rows)
        self.sums[group] += rows.sum(0)
        self.products[group].addmm_(rows.T, rows)

    def compute(self) -> Statistics:
        """Return the statistics of all vectors of all ranks.

        Raises:
            ValueError: there are fewer than two.
        """
        return self.statistics()

    def statistics(self, groups: Groups = None) -> Statistics:
        """Return the statistics of some groups, of this rank or, while synced, of all.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        count = int(total(self.number, groups))
        if count < 2:
            raise ValueError(f"{count} images: expected 2 or more, a covariance needs them")
        mean = total(self.sums, groups) / count
        covariance = total(self.products, groups).addr(mean, mean, alpha=-count).div_(count - 1)
        return Statistics(count, mean, covariance)


class FrechetDistance(Moments):
    """The Fréchet distance of images' features to a reference: FID, sFID, FD-DINOv2 by features.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[0.0], [2.0]]))
        >>> fid = FrechetDistance(moments.statistics())
        >>> fid.update(torch.tensor([[1.0], [3.0]]))
        >>> float(fid.compute())
        1.0
    """

    higher_is_better = False

    def __init__(self, reference: Statistics, groups: int = 1, period: int = 1) -> None:
        super().__init__(groups, period)
        self.reference = reference

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the distance.

        Raises:
            ValueError: there are fewer than two images, or their features have another dimension.
        """
        return self.number.new_tensor(self.value())

    def value(self, groups: Groups = None) -> float:
        """Return the distance of some groups, of this rank or, while synced, of all."""
        own = self.statistics(groups)
        mean, covariance = (each.to(own.mean) for each in self.reference[1:])
        return frechet_distance(own, Statistics(self.reference.number, mean, covariance))


class InceptionScore(Metric):
    """exp of the mean over images of KL(p(y|x) || p(y)), averaged over splits of images.

    As ADM computes it. An image of index i belongs to split i // ``split_size``, whenever and on
    whichever rank it comes. A short last split counts like the others. ``logits`` are the network's
    without bias. Of each split only sum p, sum p log p and n are kept, k + 2 numbers.

    Raises:
        ValueError: a parameter is below 1.

    Source: Salimans et al., arXiv 1606.03498; openai/guided-diffusion, evaluations/evaluator.py.

    Example:
        >>> score = InceptionScore()
        >>> score.update(torch.tensor([[50.0, 0.0], [0.0, 50.0]]), torch.arange(2))
        >>> round(float(score.compute()), 3)
        2.0
    """

    full_state_update = True
    higher_is_better = True
    sums: Tensor

    def __init__(self, split_size: int = 5_000, groups: int = 1, period: int = 1) -> None:
        super().__init__(dist_sync_fn=summed)
        if min(split_size, groups, period) < 1:
            raise ValueError(
                f"split_size={split_size}, groups={groups}, period={period}: expected 1 or more"
            )
        self.split_size, self.groups, self.period = split_size, groups, period
        empty = torch.zeros(groups, 0, 0, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b k"], indices: Labels) -> None:
        """Add images by their logits (b, k) and indices (b), which are 0 or more.

        Raises:
            ValueError: the shape is another, a value is not finite, or an index is negative.
        """
        _, splits, columns = self.sums.shape
        rows = _checked("logits", logits, max(0, columns - 2)).to(self.sums)
        indices = indices.to(rows.device)
        if len(indices) != len(rows) or (indices < 0).any():
            raise ValueError(f"indices {indices.tolist()}: expected {len(rows)} of 0 or more")
        if not len(rows):
            return
        # Of each image p, p log p and a 1, added up by group and split.
        log_p = rows.log_softmax(1)
        p = log_p.exp()
        each = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        split = indices // self.split_size
        splits = max(splits, int(split.max()) + 1)
        self.sums = padded(self.sums, [self.groups, splits, each.shape[1]]).contiguous()
        place = group_of(indices, self.groups, self.period) * splits + split
        self.sums.view(-1, each.shape[1]).index_add_(0, place, each)

    def compute(self) -> Tensor:
        """Return the score.

        Raises:
            ValueError: there are no images.
        """
        return self.sums.new_tensor(self.value())

    def value(self, groups: Groups = None) -> float:
        """Return the score of some groups, of this rank or, while synced, of all."""
        sums = total(self.sums, groups)
        sums = sums[sums[:, -1] > 0] if sums.numel() else sums
        if not sums.numel():
            raise ValueError("0 images: expected 1 or more")
        mean = sums / sums[:, -1:]
        p, negative_entropy = mean[:, :-2], mean[:, -2]
        divergence = negative_entropy - torch.special.xlogy(p, p).sum(1)
        return float(divergence.exp().mean())


def _checked(name: str, values: Tensor, width: int) -> Tensor:
    """Return values (b, ``width``), where 0 stands for any width, if all are finite."""
    if values.ndim != 2 or (width and values.shape[1] != width):
        raise ValueError(f"{name} {tuple(values.shape)}: expected (images, {width or 'any width'})")
    finite = values.isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} of {len(bad)} of {len(values)} images, rows {bad[:5]} of the batch, hold NaN "
            f"or infinity: expected finite values; look at these images, or use float32"
        )
    return values
