"""Suite: several metrics of one set of images, computed from one pass of a network over them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchmetrics import Metric

from sag_dit.evaluation.features import FeatureExtractor, Features, exact
from sag_dit.evaluation.kinds import METRICS as METRICS
from sag_dit.evaluation.kinds import MetricKind as MetricKind
from sag_dit.evaluation.kinds import metric_kind as metric_kind
from sag_dit.evaluation.kinds import usual_metrics as usual_metrics
from sag_dit.evaluation.metrics import (
    FrechetDistance,
    Statistics,
    gathered,
    halves,
    joined,
)
from sag_dit.evaluation.ratios import FrechetRatio
from sag_dit.evaluation.reference import Reference
from sag_dit.evaluation.scores import Verifier
from sag_dit.evaluation.verifiers import verified
from sag_dit.tensors import Labels, home_of_doubles

SMALL = 256
"""Features of so many dimensions or fewer are kept by group unless told otherwise: 17 MB."""
GROUPS = 32


class Suite:
    """Metrics of one set of images against a reference, in constant memory, over all ranks.

    ``metrics`` are some of ``METRICS``, the usual ones unless stated: ``fid`` compares pooled
    features, whichever network they come from (FD-DINOv2 with DINOv2's), ``sfid`` spatial ones,
    ``is`` needs logits alone; others keep the features. One of your own is named by ``module.NAME``
    of its :class:`MetricKind`. ``verifiers`` are further metrics by their names: functions
    (images, condition) -> a score for each image, of which the mean is told.

    ``groups`` is the number of parts into which the images are divided, for :meth:`confidence` to
    take random halves of: an even number of 4 or more, or 1 for no parts. FID keeps its sums once
    for each part. Left out, it is 32 where features are small, and 1 otherwise. ``period`` is the
    distance in index at which classes recur, or 1 where they are random.

    Every rank may call :meth:`update` any number of times, also never. The other methods are called
    by all ranks, in the same order.

    Raises:
        ValueError: an unknown metric, a reference that lacks what one needs, or one whose features
            come from another network or preprocessing.

    Example::

        suite = Suite(extractor, reference, ["fid", "is"])
        for pixels, indices in batches:
            suite.update(pixels, indices)
        print(suite.compute())
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Reference,
        metrics: Sequence[str] = usual_metrics(),
        *,
        verifiers: Mapping[str, Verifier] = MappingProxyType({}),
        groups: int | None = None,
        period: int = 1,
        split_size: int = 5_000,
        k: int = 3,
    ) -> None:
        # What is measured, with which network, against which reference.
        if not metrics:
            raise ValueError(f"metrics=[]: expected some of {', '.join(METRICS)}")
        kinds = {
            name: verified(name, verifiers[name]) if name in verifiers else metric_kind(name)
            for name in metrics
        }
        reference.check(extractor)
        self.extractor = extractor.eval().requires_grad_(False)
        self.reference = reference
        self.metrics = tuple(metrics)
        # How many groups: many where their sums are small.
        against = {name: self._against(name, kind) for name, kind in kinds.items()}
        if groups is None:
            sums = [each for each in against.values() if isinstance(each, Statistics)]
            sums += [each.reference for each in reference.spaces or () if "fdr" in kinds]
            most = max((each.mean.numel() for each in sums), default=0)
            groups = GROUPS if most <= SMALL else 1
        self.groups, self.period, self.split_size = groups, period, split_size
        # The states of the metrics asked for, by the names of all that share one.
        self._images = _Indices()
        self._metrics: dict[tuple[str, ...], Any] = {}
        given = {"split_size": split_size, "k": k}
        self._kinds = {**METRICS, **kinds}
        for name, kind in kinds.items():
            what = (kind.metric, kind.reference)
            names = tuple(
                n for n, each in self._kinds.items() if what == (each.metric, each.reference)
            )
            if names not in self._metrics:
                own = {option: given[option] for option in kind.options}
                compared = () if kind.reference is None else (against[name],)
                make: Callable[..., Metric] = kind.metric
                self._metrics[names] = make(*compared, **own, groups=groups, period=period)

    def _against(self, name: str, kind: MetricKind) -> Any:
        """Return what of the reference a metric is compared with, None for nothing."""
        found = None if kind.reference is None else getattr(self.reference, kind.reference)
        if found is None and kind.reference == "features":
            raise ValueError(
                f"{self.reference.name} holds statistics but no images, and {name} needs images; "
                f"leave it out or choose another reference"
            )
        if found is None and kind.needs:
            raise ValueError(f"metrics={name} needs {kind.needs}")
        if found is None and kind.reference is not None:
            raise ValueError(
                f"metrics={list(self.metrics)}: {self.reference.name} has no features for {name} "
                f"(the network is {self.extractor.name}); leave {name} out"
            )
        return found

    def to(self, device: torch.device | str) -> Suite:
        """Move the network to a device; the sums are kept there too."""
        self.extractor.to(device)
        for metric in self._metrics.values():
            for space in metric.spaces if isinstance(metric, FrechetRatio) else ():
                space.extractor.eval().requires_grad_(False).to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the network; the CPU if it has no weights."""
        tensors = (*self.extractor.parameters(), *self.extractor.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def protocol(self) -> Mapping[str, Any]:
        """All that changes the numbers beside the images: network, preprocessing, reference."""
        return self.reference.protocol

    def _each(self) -> list[Metric]:
        metrics = [self._images, *self._metrics.values()]
        # Sums stay where float64 exists. A device without it runs on one rank alone, so that no
        # ranks have to meet there.
        home = home_of_doubles(self.device)
        return [metric.to(home) for metric in metrics]

    def update(
        self, images: UInt8[Tensor, "b c h w"], indices: Labels, condition: Any = None
    ) -> None:
        """Add images by their indices; every index counts once.

        ``condition`` is what they were drawn from, for verifiers: class numbers (b,) or prompts.

        Raises:
            ValueError: the network cannot read the images, has no features for a metric, or returns
                values that are not finite; the images are named.
        """
        if len(images) != len(indices):
            raise ValueError(f"{len(images)} images and {len(indices)} indices: expected as many")
        if not len(images):
            return
        images = images.to(self.device)
        features = Features(torch.empty(len(images), 0))
        if len(self._looking()) < len(self.metrics):
            with exact(self.device):
                features = self.extractor(images)
        self._update(features, indices, images, condition)

    def update_features(self, features: Features, indices: Labels) -> None:
        """Add images by what the network says of them; no metric may look at the images.

        Raises:
            ValueError: a metric's features are missing, or values are not finite.
        """
        for name in self._looking():
            raise ValueError(f"metrics={name} looks at the images: expected Suite.update with them")
        self._update(features, indices)

    def _looking(self) -> list[str]:
        """Return the metrics that look at images, not at features of the suite's network."""
        return [name for name in self.metrics if self._kinds[name].features == "images"]

    def _update(
        self,
        features: Features,
        indices: Labels,
        images: Tensor | None = None,
        condition: Any = None,
    ) -> None:
        self._each()
        # What each metric compares is looked at before any of them takes a batch.
        used: dict[tuple[str, ...], Tensor] = {}
        for names in self._metrics:
            name = names[0]
            if self._kinds[name].features == "images":
                continue
            values = getattr(features, self._kinds[name].features)
            if values is None:
                raise ValueError(
                    f"metrics={list(self.metrics)}: {self.extractor.name} has no features for "
                    f"{name}; leave it out or choose another network"
                )
            bad = indices[~values.isfinite().all(1).to(indices.device)].tolist()
            if bad:
                raise ValueError(
                    f"{self.extractor.name} returns NaN or infinity for {len(bad)} images, indices "
                    f"{bad[:5]}: expected finite features; look at these images"
                )
            used[names] = values
        # Then all take it, some of them the images themselves.
        for names, metric in self._metrics.items():
            given = (used[names], indices) if names in used else (images, indices, condition)
            metric.update(*given)
        self._images.update(indices)

    def compute(self) -> dict[str, float]:
        """Return the metrics asked for, in that order, of the images of all ranks.

        Raises:
            ValueError: there are too few images, or an index came more than once.
        """
        self._checked_indices()
        found: dict[str, float] = {}
        for names, metric in self._metrics.items():
            value = _quietly(metric.compute)
            told = value if isinstance(value, dict) else zip(names, value.reshape(-1), strict=True)
            found |= dict(told)
        return {name: float(found[name]) for name in self.metrics}

    def warnings(self) -> list[str]:
        """Return what makes the numbers less than comparable, a sentence each; perhaps nothing."""
        return caveats(
            self.reference, self.count(), self.compute(), self._constant(), self.split_size
        )

    def count(self) -> int:
        """Return how many images there are on all ranks."""
        return len(self._checked_indices())

    def confidence(self, repeats: int = 50, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return each metric's mean and standard deviation over random halves of the images.

        The deviation estimates the standard error of the metric on all images (the delete-half
        jackknife over groups of images, see :mod:`sag_dit.evaluation.metrics`). The
        reference counts as exact. The mean is over halves: its difference to the metric on all
        images shows how much FID still depends on the number of images.

        Raises:
            ValueError: there are no groups, see ``groups``, or too few images in a half.
        """
        if self.groups == 1:
            raise ValueError(
                "groups=1: no spread can be told; make the suite with groups=10 or another even "
                "number, which keeps FID's sums as many times (34 MB each for 2,048 features)"
            )
        chosen = halves(self.groups, repeats, seed)
        self._checked_indices()
        values: dict[str, list[float]] = {}
        self._each()
        for names, metric in self._metrics.items():
            with metric.sync_context(dist_sync_fn=metric.dist_sync_fn):
                for half in chosen:
                    found = metric.value(half)
                    told = found if isinstance(found, tuple) else (found,)
                    for name, value in zip(names, told, strict=True):
                        values.setdefault(name, []).append(value)
        return {
            name: (float(np.mean(values[name])), float(np.std(values[name], ddof=1)))
            for name in self.metrics
        }

    def reset(self) -> None:
        """Forget all images; the reference stays."""
        for metric in self._each():
            metric.reset()

    def _checked_indices(self) -> Tensor:
        self._each()
        indices: Tensor = _quietly(self._images.compute)
        unique, times = indices.unique(return_counts=True)
        if len(unique) < len(indices):
            twice = unique[times > 1].tolist()
            raise ValueError(
                f"{len(twice)} indices came more than once, such as {twice[:5]}: expected each "
                f"image once; with Lightning, set use_distributed_sampler=False"
            )
        return indices

    def _constant(self) -> dict[str, bool]:
        """Whether the features of some metric do not vary at all."""
        found = {}
        for (name, *_), metric in self._metrics.items():
            if isinstance(metric, FrechetDistance):
                with metric.sync_context(dist_sync_fn=metric.dist_sync_fn):
                    own = metric.statistics()
                spread = own.covariance.diagonal().sum()
                found[name] = bool(spread <= 1e-12 * own.mean.square().sum())
        return found


class _Indices(Metric):
    """The indices of all images, in order."""

    full_state_update = True
    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gathered)
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, indices: Labels) -> None:
        self.seen.append(indices.to(self.device, torch.int64))

    def compute(self) -> Tensor:
        return joined(self.seen).long().sort().values


def _quietly(compute: Callable[[], Any]) -> Any:
    """Compute without the warning that torchmetrics gives on a rank that has no images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return compute()


def class_by_class(labels: Sequence[int]) -> bool:
    """Whether images come class by class, or nearly so.

    That is where the class changes from one image to the next less than half as often as in a
    random order.

    Example:
        >>> class_by_class([0, 0, 0, 1, 1, 1]), class_by_class([0, 1, 0, 1, 0, 1])
        (True, False)
    """
    count = len(labels)
    changes = sum(one != other for one, other in pairwise(labels))
    pairs = sum(n * (n - 1) for n in Counter(labels).values())
    expected = (count - 1) - pairs / max(1, count)
    return changes < expected / 2


def caveats(
    reference: Reference,
    count: int,
    values: Mapping[str, float],
    constant: Mapping[str, bool],
    split_size: int,
) -> list[str]:
    """Return a sentence for each thing that makes ``values`` of ``count`` images less comparable.

    ``constant`` says for each Fréchet distance whether all images have the same features.
    """
    found = [f"{reference.name}: {note}" for note in reference.notes]
    # Published numbers are of a certain count, on which FID and recall depend.
    expected = reference.protocol.get("sample_count")
    if expected is not None and count != expected:
        found.append(
            f"{count:,} images, but numbers published against {reference.name} are of "
            f"{expected:,}: FID is larger and recall differs with fewer images"
        )
    # A covariance of no more images than dimensions is singular, and so is one of equal features.
    compared = [("fid", reference.pool), ("sfid", reference.spatial)]
    compared += [("fdr", each.reference) for each in reference.spaces or ()]
    for name, statistics in compared:
        if name not in values or statistics is None:
            continue
        width = statistics.mean.numel()
        for what, number in (("images", count), ("reference images", statistics.number)):
            if number is not None and number <= width:
                found.append(
                    f"{name}: {number:,} {what} for {width:,} dimensions, so the covariance is "
                    f"singular and the distance biased; take more than {width:,}"
                )
        if constant.get(name):
            found.append(f"{name}: all images have the same features, so nothing varies")
    # The Inception Score of images that all look alike, or with a short last split.
    if values.get("is", 2.0) < 1 + 1e-6:
        found.append("is: the score is 1, every image is given the same classes")
    short = count % split_size
    if "is" in values and count > split_size and short:
        found.append(
            f"is: the last split has {short:,} images and counts as much as those of {split_size:,}"
        )
    # A reference with unequal classes.
    labels = reference.protocol.get("labels")
    if labels and labels["most"] > 1.5 * labels["fewest"]:
        found.append(
            f"{reference.name}: its classes have {labels['fewest']:,} to {labels['most']:,} "
            f"images, so a set with equal classes is a different distribution"
        )
    return found
