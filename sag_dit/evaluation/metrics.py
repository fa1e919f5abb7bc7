"""Metrics as sums over images, in float64, added up over ranks; some keep the images' features.

Each metric is torchmetrics' ``Metric``. None keeps images. Those that add up do not depend on the
order or the batches in which images come, nor on the rank they come to. Those that compare all
images with one another (:class:`FeatureSet`) keep features, and look at them in the order of the
images' indices.

Where ``groups`` is above 1 the sums are kept once for each group of images. So a metric's value on
any union of groups is known without a second look at the images. Its spread over random halves
estimates the standard error of its value on the whole set (the delete-half jackknife): for halves
no rescaling is needed.

torchmetrics gathers a state from every rank before it reduces it, and expects equal shapes or at
least equal dimensions; a rank that saw no image knows neither. ``summed`` and ``gathered`` are
given to a metric as its ``dist_sync_fn`` and return a list of one tensor, on which torchmetrics'
own reduction is the identity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from sag_dit.evaluation.kinds import measured
from sag_dit.tensors import Labels

DTYPES = (torch.float32, torch.float64, torch.int64)


def summed(state: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the sum of a state over ranks; a smaller state counts as padded with zeros."""
    shape = torch.tensor(state.shape, device=state.device)
    dist.all_reduce(shape, dist.ReduceOp.MAX, group=group)
    total = padded(state, shape.tolist()).clone()
    dist.all_reduce(total, group=group)
    return [total]


def gathered(state: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the rows of all ranks, one rank after the other; a rank may have none.

    An empty state's type and width are unknown and taken from the other ranks.
    """
    ranks = dist.get_world_size(group)
    # Every rank tells how many rows it has, of which type, and their shape of up to two dimensions.
    rows, kind, shape = 0, 0, [0, 0]
    if state.numel():
        rows, kind = len(state), DTYPES.index(state.dtype)
        shape[: state.ndim - 1] = state.shape[1:]
    header = torch.tensor([rows, kind, *shape], device=state.device)
    headers = [torch.zeros_like(header) for _ in range(ranks)]
    dist.all_gather(headers, header, group=group)
    counts, kinds, *shapes = torch.stack(headers).T.tolist()
    if not max(counts):
        return [state]
    # Then its rows, padded to as many as any rank has.
    width = [max(each) for each in shapes if max(each)]
    own = state.new_zeros([max(counts), *width], dtype=DTYPES[max(kinds)])
    if rows:
        own[:rows] = state
    every = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(every, own, group=group)
    return [torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])]


def padded(state: Tensor, shape: list[int]) -> Tensor:
    """Return a state of a larger shape, the new entries zero; itself if there are none."""
    if list(state.shape) == shape:
        return state
    missing = [size - had for size, had in zip(shape, state.shape, strict=True)]
    return functional.pad(state, [n for each in reversed(missing) for n in (0, each)])


def joined(rows: list[Tensor] | Tensor) -> Tensor:
    """Return the rows of a list state, which torchmetrics makes a tensor once it is synced."""
    if isinstance(rows, Tensor):
        return rows
    return torch.cat(rows) if rows else torch.zeros(0)


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


EPSILON = torch.finfo(torch.float64).eps
COLUMNS = 256
"""Columns multiplied at once, so that no second matrix is held beside a product."""


class Statistics(NamedTuple):
    """Mean (d) and unbiased covariance (d, d) of ``number`` vectors, None if that is not known.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> frechet_distance(Statistics(9, one[0], one), Statistics(9, 3 * one[0], one))
        4.0
    """

    number: int | None
    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the squared Fréchet distance of two normal distributions.

        |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

    With A = F F^T, the non-zero eigenvalues of A B are those of the symmetric F^T B F. So the last
    trace is a sum of square roots of non-negative numbers, also where A or B is singular.

    Raises:
        ValueError: the two differ in dimension, or hold values that are not finite.

    Source: Heusel et al., arXiv 1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {a.mean.numel()} and {b.mean.numel()} dimensions: expected the same "
            f"network and preprocessing on both sides"
        )
    if a.number is not None and b.number is not None and b.number < a.number:
        a, b = b, a  # the smaller set has a covariance of lower rank, and so a smaller factor F
    for each in (a, b):
        if not (each.mean.isfinite().all() and each.covariance.isfinite().all()):
            raise ValueError("the statistics hold NaN or infinity: expected finite features")
    difference = a.mean - b.mean
    trace = a.covariance.trace() + b.covariance.trace()
    distance = difference @ difference + trace - 2 * _trace_of_root(a.covariance, b.covariance)
    return max(0.0, float(distance))


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    factor = _factor(a)
    width = factor.shape[1]
    product = a.new_empty(width, width)
    for start in range(0, width, COLUMNS):
        columns = slice(start, start + COLUMNS)
        product[:, columns] = factor.T @ (b @ factor[:, columns])
    del factor
    roots: Tensor = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return roots.sum()


def _factor(a: Tensor) -> Tensor:
    """Return F (d, r) with F F^T = A: by Cholesky, or of A's rank by eigenvectors if singular."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:
        values, vectors = torch.linalg.eigh(a)
        kept = values > len(values) * EPSILON * values[-1].clamp(min=0)
        factor = vectors[:, kept] * values[kept].sqrt()
    return factor


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
        rows = _all_finite("features", features, self.sums.shape[1]).to(self.sums)
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


@measured(
    "fid",
    "FD",
    "pool",
    reference="pool",
    labels={"inception": "FID", "dinov2": "FD-DINOv2"},
    usual=True,
    tells="how far mean and covariance of the features are from the real ones: fidelity and "
    "diversity in one number",
    cost="d² sums; two eigenvalue problems of d x d",
    source="[Heusel 2017](https://arxiv.org/abs/1706.08500)",
)
@measured(
    "sfid",
    "sFD",
    "spatial",
    reference="spatial",
    labels={"inception": "sFID"},
    usual=True,
    tells="the same of features that know the place in the image",
    cost="as fid",
    source="[Nash 2021](https://arxiv.org/abs/2103.03841)",
)
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


@measured(
    "is",
    "IS",
    "logits",
    options=["split_size"],
    usual=True,
    tells="how clearly each image shows one class, and how many classes there are; no real images",
    cost="sums of the classes' probabilities",
    source="[Salimans 2016](https://arxiv.org/abs/1606.03498)",
)
class InceptionScore(Metric):
    """exp of the mean over images of KL(p(y|x) || p(y)), averaged over splits of images.

    As ADM computes it. An image of index i belongs to split i // ``split_size``, whenever and on
    whichever rank it comes. A short last split counts like the others. ``logits`` are the network's
    without bias. Of each split that occurs only its number, sum p, sum p log p and n are kept,
    k + 3 numbers; so an index may be any number.

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
    splits: Tensor
    sums: Tensor

    def __init__(self, split_size: int = 5_000, groups: int = 1, period: int = 1) -> None:
        super().__init__(dist_sync_fn=gathered)
        if min(split_size, groups, period) < 1:
            raise ValueError(
                f"split_size={split_size}, groups={groups}, period={period}: expected 1 or more"
            )
        self.split_size, self.groups, self.period = split_size, groups, period
        # The splits that occur, in order, and of each the sums of all groups.
        self.add_state("splits", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")
        empty = torch.zeros(0, groups, 0, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b k"], indices: Labels) -> None:
        """Add images by their logits (b, k) and indices (b), which are 0 or more.

        Raises:
            ValueError: the shape is another, a value is not finite, or an index is negative.
        """
        rows = _all_finite("logits", logits, max(0, self.sums.shape[2] - 2)).to(self.sums)
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
        known, self.splits = self.splits, torch.cat([self.splits, split]).unique()
        if len(self.splits) > len(known):
            grown = each.new_zeros(len(self.splits), self.groups, each.shape[1])
            if len(known):
                grown[torch.searchsorted(self.splits, known)] = self.sums
            self.sums = grown
        place = torch.searchsorted(self.splits, split) * self.groups
        place = place + group_of(indices, self.groups, self.period)
        self.sums.view(-1, each.shape[1]).index_add_(0, place, each)

    def compute(self) -> Tensor:
        """Return the score.

        Raises:
            ValueError: there are no images.
        """
        return self.sums.new_tensor(self.value())

    def value(self, groups: Groups = None) -> float:
        """Return the score of some groups, of this rank or, while synced, of all."""
        # Ranks may have had images of the same split.
        splits, place = self.splits.unique(return_inverse=True)
        merged = self.sums.new_zeros(len(splits), *self.sums.shape[1:])
        merged.index_add_(0, place, self.sums)
        sums = total(merged.transpose(0, 1).contiguous(), groups)
        sums = sums[sums[:, -1] > 0] if sums.numel() else sums
        if not sums.numel():
            raise ValueError("0 images: expected 1 or more")
        mean = sums / sums[:, -1:]
        p, negative_entropy = mean[:, :-2], mean[:, -2]
        divergence = negative_entropy - torch.special.xlogy(p, p).sum(1)
        return float(divergence.exp().mean())


def _all_finite(name: str, values: Tensor, width: int) -> Tensor:
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


BLOCK = 4096
"""The distances of so many to so many vectors are held at once, 134 MB."""


class FeatureSet(Metric):
    """Features of all images, kept to be compared with one another and with a reference's.

    A subclass computes its ``values``, in the order of its names in ``METRICS``. Vectors of all
    images are kept in float32 (410 MB at 50,000 x 2,048), and every rank gathers them.

    ``reference`` (m, d) may lie on any device.

    Raises:
        ValueError: the reference is no matrix of finite values.

    Example::

        class Nearest(FeatureSet):
            def values(self, reference, rows):
                return (float(squared_distances(rows, reference).amin(1).sqrt().mean()),)
    """

    full_state_update = True
    features: list[Tensor]
    indices: list[Tensor]

    def __init__(self, reference: Float[Tensor, "m d"], groups: int = 1, period: int = 1) -> None:
        super().__init__(dist_sync_fn=gathered)
        if groups < 1 or period < 1:
            raise ValueError(f"groups={groups}, period={period}: expected 1 or more")
        if reference.ndim != 2 or not reference.isfinite().all():
            raise ValueError(
                f"reference features {tuple(reference.shape)}: expected (images, width), all finite"
            )
        self.reference, self.groups, self.period = reference, groups, period
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("indices", [], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "b d"], indices: Labels) -> None:
        """Keep features (b, d) and indices (b) of images.

        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        wanted = (len(indices), self.reference.shape[1])
        if tuple(features.shape) != wanted or not features.isfinite().all():
            raise ValueError(f"features {tuple(features.shape)}: expected {wanted}, all finite")
        if len(indices):
            self.features.append(features.to(self.device, torch.float32))
            self.indices.append(indices.to(self.device))

    def compute(self) -> Any:
        """Return the values.

        Raises:
            ValueError: there are too few images.
        """
        return torch.tensor(self.value(), dtype=torch.float64)

    def value(self, groups: Groups = None) -> tuple[float, ...]:
        """Return the values of some groups, of this rank unless the states are synced."""
        rows, indices = joined(self.features), joined(self.indices)
        # One order, so that neither the batches nor the ranks change the last bit of a distance.
        order = indices.argsort()
        if groups is not None:
            group = group_of(indices[order], self.groups, self.period)
            order = order[torch.isin(group, group.new_tensor(groups))]
        return self.values(self.reference.to(rows.device), rows[order])

    @abstractmethod
    def values(
        self, reference: Float[Tensor, "m d"], rows: Float[Tensor, "n d"]
    ) -> tuple[float, ...]:
        """Return the values of images ``rows`` against the reference.

        Raises:
            ValueError: there are too few images.
        """


@measured(
    "precision",
    "precision",
    "pool",
    reference="features",
    options=["k"],
    usual=True,
    tells="the share of images that look real",
    cost="all distances, n² + m² + n m; keeps features",
    source="[Kynkäänniemi 2019](https://arxiv.org/abs/1904.06991)",
)
@measured(
    "recall",
    "recall",
    "pool",
    reference="features",
    options=["k"],
    usual=True,
    tells="the share of real images that the model could have drawn",
    cost="with precision",
    source="the same",
)
class PrecisionRecall(FeatureSet):
    """Precision, the share of images within the reference's balls, and recall, the other way round.

    The ball of a vector reaches to its ``k``-th nearest neighbour in its own set, itself not
    counted, and includes its surface; distances are Euclidean. They are not kept, see ``BLOCK``.

    ``reference`` (m, d), on whichever device; ADM compares 10,000.

    Raises:
        ValueError: the reference has not more than ``k`` vectors, or they are not finite.

    Source: Kynkäänniemi et al., arXiv 1904.06991; openai/guided-diffusion, evaluations/evaluator.py
    (which computes the squared distances in half precision where these do not overflow).

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> metric = PrecisionRecall(real, k=1)
        >>> metric.update(torch.tensor([[0.5], [9.0], [9.5], [1.5]]), torch.arange(4))
        >>> precision, recall = metric.value(None)
        >>> round(float(precision), 2)
        0.5
    """

    higher_is_better = True

    def __init__(
        self, reference: Float[Tensor, "m d"], k: int = 3, groups: int = 1, period: int = 1
    ) -> None:
        super().__init__(reference, groups, period)
        _enough(len(reference), k, "reference images")
        self.k = k
        self._reference_radii: Tensor | None = None

    def compute(self) -> dict[str, Tensor]:
        """Return both by their names.

        Raises:
            ValueError: there are not more than ``k`` images.
        """
        return dict(zip(("precision", "recall"), super().compute(), strict=True))

    def values(
        self, reference: Float[Tensor, "m d"], rows: Float[Tensor, "n d"]
    ) -> tuple[float, float]:
        """Return precision and recall."""
        _enough(len(rows), self.k, "images")
        if self._reference_radii is None:
            self._reference_radii = squared_radii(reference, self.k)
        return precision_recall(reference, rows, self.k, self._reference_radii.to(rows.device))


def precision_recall(
    reference: Float[Tensor, "m d"],
    images: Float[Tensor, "n d"],
    k: int = 3,
    reference_radii: Float64[Tensor, "m"] | None = None,
) -> tuple[float, float]:
    """Return (precision, recall) of images against a reference, both in 0..1."""
    if reference_radii is None:
        reference_radii = squared_radii(reference, k)
    radii = squared_radii(images, k)
    within: Bool[Tensor, "n"] = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    covered: Bool[Tensor, "m"] = torch.zeros(len(reference), dtype=torch.bool, device=images.device)
    for i in _blocks(len(images)):
        for j in _blocks(len(reference)):
            distances = squared_distances(images[i], reference[j])
            within[i] |= (distances <= reference_radii[j]).any(1)
            covered[j] |= (distances <= radii[i, None]).any(0)
    return float(within.double().mean()), float(covered.double().mean())


def squared_radii(vectors: Float[Tensor, "n d"], k: int) -> Float64[Tensor, "n"]:
    """Return each vector's squared distance to its ``k``-th nearest neighbour in the set."""
    nearest = vectors.new_full((len(vectors), k + 1), torch.inf, dtype=torch.float64)
    for i in _blocks(len(vectors)):
        for j in _blocks(len(vectors)):
            if j.start < i.start:
                continue  # distances are symmetric: the other block has served both
            distances = squared_distances(vectors[i], vectors[j])
            nearest[i] = _smallest(distances, nearest[i])
            if i != j:
                nearest[j] = _smallest(distances.T, nearest[j])
    return nearest.amax(1)


def squared_distances(u: Float[Tensor, "n d"], v: Float[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Return |u|^2 - 2 u v + |v|^2, 0 at least, in float64."""
    u, v = u.double(), v.double()
    distances = torch.addmm(v.square().sum(1), u, v.T, alpha=-2)
    return distances.add_(u.square().sum(1, keepdim=True)).clamp_(min=0)


def _smallest(distances: Tensor, known: Tensor) -> Tensor:
    """Return each row's smallest values, as many as were known, of the known and the new ones."""
    count = min(known.shape[1], distances.shape[1])
    new = distances.topk(count, dim=1, largest=False, sorted=False).values
    return torch.cat([known, new], 1).topk(known.shape[1], dim=1, largest=False).values


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _enough(count: int, k: int, what: str) -> None:
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more")
    if count <= k:
        raise ValueError(
            f"{count} {what}: expected more than k={k}, or no ball reaches to a k-th neighbour"
        )


@measured(
    "density",
    "density",
    "pool",
    reference="features",
    tells="how many real images each image lies near, as a share of k: 1 for real images, more "
    "where images crowd into the densest places; an outlier among the real ones weighs little",
    cost="distances to the reference, m² + n m; keeps features",
    source="[Naeem 2020](https://arxiv.org/abs/2002.09797)",
)
@measured(
    "coverage",
    "coverage",
    "pool",
    reference="features",
    tells="the share of real images that have an image among their neighbours; 0.97 for real "
    "images of the same number",
    cost="with density",
    source="the same",
)
class DensityCoverage(FeatureSet):
    """Density and coverage: how the images lie within the balls of the reference alone.

        density  = 1 / (k n) sum_j sum_i [ |x_j - r_i| < radius_i ]
        coverage = 1 / m sum_i [ min_j |x_j - r_i| < radius_i ]

    for images x_1..n and real images r_1..m. The ball of a real image reaches to its ``k``-th
    nearest neighbour among them, itself not counted, and does not include its surface.

    Raises:
        ValueError: the reference has not more than ``k`` vectors, or they are not finite.

    Source: Naeem et al., arXiv 2002.09797, who take k = 5; clovaai/generative-evaluation-prdc.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
        >>> metric = DensityCoverage(real, k=1)
        >>> metric.update(torch.tensor([[0.5], [0.6]]), torch.arange(2))
        >>> metric.value()
        (2.0, 0.5)
    """

    higher_is_better = True

    def __init__(
        self, reference: Float[Tensor, "m d"], k: int = 5, groups: int = 1, period: int = 1
    ) -> None:
        super().__init__(reference, groups, period)
        _enough(len(reference), k, "reference images")
        self.k = k
        self._radii: Tensor | None = None

    def values(
        self, reference: Float[Tensor, "m d"], rows: Float[Tensor, "n d"]
    ) -> tuple[float, float]:
        """Return density and coverage."""
        if not len(rows):
            raise ValueError("0 images: expected 1 or more")
        if self._radii is None:
            self._radii = squared_radii(reference, self.k)
        radii = self._radii.to(rows.device)
        inside, covered = 0, torch.zeros_like(radii, dtype=torch.bool)
        for i in _blocks(len(rows)):
            for j in _blocks(len(reference)):
                near = squared_distances(rows[i], reference[j]) < radii[j]
                inside += int(near.sum())
                covered[j] |= near.any(0)
        return inside / (self.k * len(rows)), float(covered.double().mean())


class KernelDistance(FeatureSet):
    """The squared maximum mean discrepancy of images and reference, by a kernel.

    Over all images and all of the reference's vectors, where others average over random subsets.

    Example::

        class Linear(KernelDistance):
            def kernel(self, u, v):
                return u @ v.T
    """

    higher_is_better = False
    unbiased = True
    """Whether a vector's kernel with itself is left out."""
    factor = 1.0
    _of_reference: float | None = None

    @abstractmethod
    def kernel(
        self, u: Float64[Tensor, "n d"], v: Float64[Tensor, "m d"]
    ) -> Float64[Tensor, "n m"]:
        """Return the kernel of each pair of vectors."""

    def values(
        self, reference: Float[Tensor, "m d"], rows: Float[Tensor, "n d"]
    ) -> tuple[float, ...]:
        """Return the distance, times ``factor``."""
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} images: expected 2 or more")
        if self._of_reference is None:
            self._of_reference = self._within(reference)
        between = sum(
            float(self.kernel(rows[i].double(), reference[j].double()).sum())
            for i in _blocks(len(rows))
            for j in _blocks(len(reference))
        ) / (len(rows) * len(reference))
        return (self.factor * (self._within(rows) + self._of_reference - 2 * between),)

    def _within(self, rows: Tensor) -> float:
        """Return the mean of the kernel over the pairs of one set."""
        pairs = own = 0.0
        for i in _blocks(len(rows)):
            for j in _blocks(len(rows)):
                if j.start < i.start:
                    continue  # kernels are symmetric: the other block counts twice
                values = self.kernel(rows[i].double(), rows[j].double())
                pairs += float(values.sum()) * (1 if i == j else 2)
                own += float(values.diagonal().sum()) if i == j else 0.0
        if self.unbiased:
            return (pairs - own) / (len(rows) * (len(rows) - 1))
        return pairs / len(rows) ** 2


@measured(
    "kd",
    "KD",
    "pool",
    reference="features",
    labels={"inception": "KID", "dinov2": "KDD"},
    tells="as fid, from the first three moments and without its bias: comparable between sets of "
    "different size; about 0, also slightly below, for real images",
    cost="all products, n² + m² + n m; keeps features",
    source="[Bińkowski 2018](https://arxiv.org/abs/1801.01401)",
)
class PolynomialDistance(KernelDistance):
    """KID by Inception's features, KDD by DINOv2's: k(x, y) = (x y / d + 1)^3, unbiased.

    Others give the mean over random subsets of 1,000 images, which estimates the same.

    Source: Bińkowski et al., arXiv 1801.01401.

    Example:
        >>> kd = PolynomialDistance(torch.tensor([[0.0], [2.0]]))
        >>> kd.update(torch.tensor([[0.0], [1.0]]), torch.arange(2))
        >>> kd.value()
        (-13.0,)
    """

    def kernel(
        self, u: Float64[Tensor, "n d"], v: Float64[Tensor, "m d"]
    ) -> Float64[Tensor, "n m"]:
        """Return (u v / d + 1)^3."""
        return (u @ v.T).div_(u.shape[1]).add_(1).pow_(3)


@measured(
    "mmd",
    "MMD",
    "pool",
    reference="features",
    labels={"clip": "CMMD"},
    tells="a distance that assumes no normal distribution; CMMD by CLIP's features",
    cost="as kd",
    source="[Jayasumana 2024](https://arxiv.org/abs/2401.09603)",
)
class GaussianDistance(KernelDistance):
    """CMMD by CLIP's features: k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), times 1,000, sigma = 10.

    As its authors compute it, with each vector's kernel with itself: so it is never below 0.

    Source: Jayasumana et al., arXiv 2401.09603.

    Example:
        >>> mmd = GaussianDistance(torch.tensor([[0.0], [0.0]]))
        >>> mmd.update(torch.tensor([[10.0], [10.0]]), torch.arange(2))
        >>> round(mmd.value()[0], 3)
        786.939
    """

    unbiased, factor, sigma = False, 1000.0, 10.0

    def kernel(
        self, u: Float64[Tensor, "n d"], v: Float64[Tensor, "m d"]
    ) -> Float64[Tensor, "n m"]:
        """Return exp(-|u - v|^2 / (2 sigma^2))."""
        return squared_distances(u, v).mul_(-0.5 / self.sigma**2).exp_()


@measured(
    "vendi",
    "Vendi",
    "pool",
    tells="how many different images there are, in effect: 1 if all are the same; no real images",
    cost="d² sums; the eigenvalues of d x d",
    source="[Friedman 2023](https://arxiv.org/abs/2210.02410)",
)
class VendiScore(Moments):
    """exp of the entropy of the eigenvalues of K / n, where K holds the cosines of all pairs.

    K / n = X X^T / n has the non-zero eigenvalues of X^T X / n, a sum over images. So no features
    are kept, and the score is that of all images at once, not of a subset of them.

    Source: Friedman and Dieng, arXiv 2210.02410; the kernel as in dgm-eval.

    Example:
        >>> vendi = VendiScore()
        >>> vendi.update(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> round(vendi.value(), 6)
        2.0
    """

    higher_is_better = True

    def update(self, features: Float[Tensor, "b d"], indices: Labels | None = None) -> None:
        """Add vectors by their directions; ``indices`` (b) are needed where there are groups."""
        super().update(functional.normalize(features.to(self.sums)), indices)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the score.

        Raises:
            ValueError: there are no images.
        """
        return self.number.new_tensor(self.value())

    def value(self, groups: Groups = None) -> float:
        """Return the score of some groups, of this rank or, while synced, of all."""
        count = int(total(self.number, groups))
        if not count:
            raise ValueError("0 images: expected 1 or more")
        shares = torch.linalg.eigvalsh(total(self.products, groups) / count).clamp(min=0)
        return float(torch.special.entr(shares).sum().exp())
