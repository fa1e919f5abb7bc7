"""Improved precision and recall: how much of each set lies within the other's neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torchmetrics import Metric

from sag_dit.evaluation.distributed import gathered, joined
from sag_dit.evaluation.subsets import Groups, group_of
from sag_dit.tensors import Labels

BLOCK = 4096
"""The distances of so many to so many vectors are held at once, 134 MB."""


class PrecisionRecall(Metric):
    """Precision, the share of images within the reference's balls, and recall, the other way round.

    The ball of a vector reaches to its ``k``-th nearest neighbour in its own set, itself not
    counted, and includes its surface; distances are Euclidean. Vectors of all images are kept (410
    MB at 50,000 x 2,048, in float32); the distances are not, see ``BLOCK``.

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

    full_state_update = True
    higher_is_better = True
    features: list[Tensor]
    indices: list[Tensor]

    def __init__(
        self, reference: Float[Tensor, "m d"], k: int = 3, groups: int = 1, period: int = 1
    ) -> None:
        super().__init__(dist_sync_fn=gathered)
        if k < 1 or groups < 1 or period < 1:
            raise ValueError(f"k={k}, groups={groups}, period={period}: expected 1 or more")
        if reference.ndim != 2 or not reference.isfinite().all():
            raise ValueError(
                f"reference features {tuple(reference.shape)}: expected (images, width), all finite"
            )
        _enough(len(reference), k, "reference images")
        self.reference, self.k, self.groups, self.period = reference, k, groups, period
        self._reference_radii: Tensor | None = None
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

    def compute(self) -> dict[str, Tensor]:
        """Return precision and recall.

        Raises:
            ValueError: there are not more than ``k`` images.
        """
        precision, recall = self.value()
        return {
            "precision": torch.tensor(precision, dtype=torch.float64),
            "recall": torch.tensor(recall, dtype=torch.float64),
        }

    def value(self, groups: Groups = None) -> tuple[float, float]:
        """Return both for some groups, of this rank unless the states are synced."""
        rows, indices = joined(self.features), joined(self.indices)
        # One order, so that neither the batches nor the ranks change the last bit of a distance.
        order = indices.argsort()
        if groups is not None:
            group = group_of(indices[order], self.groups, self.period)
            order = order[torch.isin(group, group.new_tensor(groups))]
        _enough(len(order), self.k, "images")
        rows = rows[order]
        reference = self.reference.to(rows.device)
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
    if count <= k:
        raise ValueError(
            f"{count} {what}: expected more than k={k}, or no ball reaches to a k-th neighbour"
        )
