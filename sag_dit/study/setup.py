"""The set-up of a measurement: features, reference and metrics, chosen and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.checkpoints.zoo import WEIGHTS_FOLDER, local_folders
from sag_dit.data.crop import WHITE
from sag_dit.data.digits import CLASS_NAMES as DIGITS
from sag_dit.data.emoji import all_emoji
from sag_dit.data.patches import CLASS_NAMES as PATCHES
from sag_dit.data.splits import SPLITS
from sag_dit.evaluation.classifier import KINDS
from sag_dit.evaluation.features import FeatureExtractor, feature_networks
from sag_dit.evaluation.kinds import MetricKind
from sag_dit.evaluation.ratios import FeatureSpace
from sag_dit.evaluation.reference import Reference, load_reference
from sag_dit.evaluation.scores import Verifier, verifier_identity
from sag_dit.evaluation.suite import GROUPS, METRICS, SMALL, Suite, metric_kind, usual_metrics
from sag_dit.evaluation.verifiers import verified
from sag_dit.study.results import Metric

Shape = tuple[int, ...]

BUNDLED: Mapping[str, Callable[[], Sequence[str]]] = {
    "digits": lambda: DIGITS,
    "patches": lambda: PATCHES,
    "emoji": lambda: all_emoji().class_names,
}
"""Features with a reference of their own, and the classes that they are made for."""

ADM_FILES = {
    64: "VIRTUAL_imagenet64_labeled.npz",
    128: "VIRTUAL_imagenet128_labeled.npz",
    256: "VIRTUAL_imagenet256_labeled.npz",
    512: "VIRTUAL_imagenet512.npz",
}
ADM_FOLDER = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
ADM_PLACES = {file: f"imagenet/{side}" for side, file in ADM_FILES.items()} | {
    f"VIRTUAL_lsun_{what}256.npz": f"lsun/{what}" for what in ("bedroom", "cat", "horse")
}
"""Where ADM's files lie in that folder."""

NEIGHBOUR, SPLIT_SIZE = 3, 5_000
"""ADM's: precision's and recall's neighbour, and the images of a split of the Inception Score."""
FEW_GROUPS = 10
"""Groups for ± where features are large; FID's sums, 34 MB for Inception, are kept as often."""


@dataclass(frozen=True)
class Ratio:
    """Of the metric fdr: its networks or their names, and real images that set the scale.

    ``split`` is a folder, an npz or a split; None is the other half of a bundled reference.

    Example:
        >>> Ratio(["inception", "dinov2"], "imagenet/val").split
        'imagenet/val'
    """

    features: Sequence[FeatureExtractor | str]
    split: str | None = None


@dataclass(frozen=True, eq=False)
class Setup:
    """Features, a reference and metrics that fit each other and the images.

    Example::

        setup = Setups("cpu").setup(example_of(model), model.class_names)
        suite = setup.suite(count=300, period=10, spread=True)
    """

    extractor: FeatureExtractor
    reference: Reference
    metrics: tuple[str, ...]
    reference_sha256: str
    verifiers: Mapping[str, Verifier] = field(default_factory=dict)

    def kind(self, name: str) -> MetricKind:
        """Return what is known of one of the metrics."""
        found = self.verifiers.get(name)
        return metric_kind(name) if found is None else verified(name, found)

    def told(self) -> dict[str, Any]:
        """Return what else changes the numbers: networks of fdr and verifiers, as JSON values."""
        spaces = [dict(each.told) for each in self.reference.spaces or () if "fdr" in self.metrics]
        return {
            "fdr": spaces or None,
            "verifiers": {
                name: verifier_identity(each)
                for name, each in self.verifiers.items()
                if name in self.metrics
            },
        }

    def suite(self, count: int, period: int, spread: bool) -> Suite:
        """Return a suite for ``count`` images whose classes recur with ``period``.

        With ``spread`` it can tell ±, from halves of the images that are as large as can be and, if
        there are enough of each class, balanced.
        """
        known = [self.reference.pool, self.reference.spatial]
        known += [each.reference for each in self.reference.spaces or ()]
        widths = [each.mean.numel() for each in known if each is not None]
        most = GROUPS if max(widths, default=0) <= SMALL else FEW_GROUPS
        if count // period < most:
            period = 1
        groups = even_groups(count // period, most) if spread else 1
        return Suite(
            self.extractor,
            self.reference,
            self.metrics,
            verifiers=self.verifiers,
            groups=groups,
            period=period if groups > 1 else 1,
            split_size=SPLIT_SIZE,
            k=NEIGHBOUR,
        )

    def labels(self) -> dict[str, Metric]:
        """Return what the metrics are called with these features."""
        network = self.extractor.name
        return {
            name: Metric(kind.label_with(network), kind.higher_is_better)
            for name, kind in zip(self.metrics, map(self.kind, self.metrics), strict=True)
        }


def even_groups(runs: int, most: int) -> int:
    """Return into how many groups of equal size runs of images are put, 1 if they are too few.

    At least half of ``most`` and an even number; if none divides the runs, the largest.
    """
    allowed = range(min(most, runs) // 2 * 2, max(4, most // 2) - 1, -2)
    return next((groups for groups in allowed if runs % groups == 0), max(allowed, default=1))


def check_metrics(metrics: Sequence[str] | None, verifiers: Sequence[str] = ()) -> None:
    """Refuse metrics that do not exist, before anything is loaded.

    Raises:
        ValueError: an unknown metric, or none; a verifier with the name of a metric.
    """
    for name in verifiers:
        if name in METRICS or not name.isidentifier():
            raise ValueError(
                f"verifiers.{name}: expected a name that no metric has, of letters, digits and _"
            )
    if metrics is None:
        return
    if isinstance(metrics, str):
        raise ValueError(f"metrics={metrics}: expected a list, such as metrics=[{metrics}]")
    if not metrics:
        raise ValueError(
            f"metrics=[]: expected some of {', '.join(METRICS)}, or null for those of "
            f"{', '.join(usual_metrics())} that the features allow; FD-DINOv2 is fid with "
            f"features=dinov2"
        )
    for name in metrics:
        if name not in verifiers:
            metric_kind(str(name))


class Setups:
    """Set-ups of measurements on one device; a network or a reference is loaded once.

    Example::

        setups = Setups("cuda")
        setups.setup(example_of(model), features="dinov2", reference="photos/")
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._extractors: dict[str, FeatureExtractor] = {}
        self._references: dict[str, Reference] = {}

    def setup(
        self,
        example: Tensor,
        class_names: Sequence[str] = (),
        *,
        features: FeatureExtractor | str | None = None,
        reference: str | None = None,
        background: str = WHITE,
        metrics: Sequence[str] | None = None,
        fdr: Ratio | None = None,
        verifiers: Mapping[str, Verifier] | None = None,
    ) -> Setup:
        """Return what to measure images like ``example``, uint8 (1, c, h, w), with.

        ``features`` is a network or the name of one of ``feature_networks()``, ``reference`` a
        folder, an npz or a split such as digits:report, ``background`` the colour behind what is
        transparent in its images, ``metrics`` some of ``METRICS``. What is None is chosen by the
        images: a bundled model's own network and reference, else Inception and ADM's file of
        ImageNet, and the usual metrics that are possible. ``fdr`` says what the metric of that name
        compares with. ``verifiers`` are measured beside the metrics: functions
        (images, condition) -> a score for each image.

        Raises:
            ValueError: weights or a reference that cannot be found, images that the features cannot
                read, or metrics that features or reference do not allow.
        """
        # The network and the reference that are asked for, or else those that suit the images.
        bundled = _bundled_features(tuple(example.shape[1:]), class_names)
        extractor = self._extractor(features or bundled or "inception")
        size = (example.shape[2], example.shape[3])
        if reference:
            source = _located(reference)
        else:
            source = _default_reference(extractor.name, size, class_names)
        known = self._reference(source, extractor, background)
        # One image tells what the network gives, which has to fit the reference.
        with torch.no_grad():
            seen = extractor(example.to(self._device))
        if known.pool is not None and seen.pool.shape[1] != known.pool.mean.numel():
            raise ValueError(
                f"{extractor.name} gives {seen.pool.shape[1]} features and {known.name} has "
                f"{known.pool.mean.numel()}: expected the same; choose another reference"
            )
        # What fdr compares with, beside the network itself.
        judges = dict(verifiers or {})
        if metrics is not None and "fdr" in metrics:
            spaces = self._spaces(fdr, extractor, source, background, example)
            known = replace(known, spaces=spaces)
        # All metrics that both allow, or those that are asked for, if they do; and all verifiers.
        own = {name: metric_kind(name) for name in metrics or () if name not in judges}
        own |= {name: verified(name, each) for name, each in judges.items()}
        kinds = {**METRICS, **own}
        possible = [name for name, kind in kinds.items() if kind.possible(seen, known)]
        usual = [name for name in possible if kinds[name].usual]
        wanted = usual if metrics is None else list(metrics)
        wanted += [name for name in judges if name not in wanted]
        missing = [name for name in wanted if name not in possible]
        if missing:
            raise ValueError(
                f"metrics={', '.join(missing)}: not possible with the features "
                f"{extractor.name} and the reference {known.name}; possible are "
                f"{', '.join(possible)}"
            )
        return Setup(extractor, known, tuple(wanted), _digest(known), judges)

    def _spaces(
        self,
        fdr: Ratio | None,
        own: FeatureExtractor,
        source: str,
        background: str,
        example: Tensor,
    ) -> list[FeatureSpace]:
        """Return what each network of fdr says of the reference, and of the real split."""
        if fdr is None or not fdr.features:
            raise ValueError(f"metrics=fdr needs {METRICS['fdr'].needs}")
        split = fdr.split or _other_half(source)
        spaces = []
        for each in fdr.features:
            try:
                extractor = own if each == own.name else self._extractor(each)
                with torch.no_grad():
                    extractor(example.to(self._device))
                real = (self._reference(name, extractor, background) for name in (source, split))
                spaces.append(FeatureSpace.of(extractor, *real))
            except ValueError as error:
                raise ValueError(f"fdr: {error}") from error
        return spaces

    def _extractor(self, features: FeatureExtractor | str) -> FeatureExtractor:
        if isinstance(features, str):
            if features not in feature_networks():
                raise ValueError(
                    f"features={features}: expected one of {', '.join(feature_networks())}, "
                    f"or a FeatureExtractor"
                )
            if features not in self._extractors:
                try:
                    self._extractors[features] = feature_networks()[features]()
                except ValueError as error:
                    raise ValueError(f"features: {error}") from error
            features = self._extractors[features]
        return features.eval().requires_grad_(False).to(self._device)

    def _reference(self, source: str, extractor: FeatureExtractor, background: str) -> Reference:
        read = [source, background, extractor.name, dict(extractor.protocol)]
        key = json.dumps(read, default=str)
        if key not in self._references:
            try:
                self._references[key] = load_reference(source, extractor, background=background)
            except ValueError as error:
                raise ValueError(f"reference={source}: {_without(source, str(error))}") from error
        return self._references[key]


def _other_half(source: str) -> str:
    """Return the split of real images beside a bundled reference.

    Raises:
        ValueError: it is none of the halves.
    """
    halves = {"report": "tune", "tune": "report", "train": "held_out", "held_out": "train"}
    name, _, part = source.partition(":")
    other = f"{name}:{halves.get(part, '')}"
    if source not in SPLITS or other not in SPLITS:
        raise ValueError(
            f"fdr.split is not set: expected real images that {source} does not hold: a folder, an "
            f"npz or a split such as digits:tune"
        )
    return other


def example_of(model: Model) -> Tensor:
    """Return a black image as the model would draw it, uint8 (1, c, h, w)."""
    return torch.zeros(1, *model.image_shape, dtype=torch.uint8)


def _without(source: str, message: str) -> str:
    """Return a message without the source that it may begin with."""
    for start in (f"reference={source}: ", f"{source!r}: "):
        message = message.removeprefix(start)
    return message


def _bundled_features(shape: Shape, class_names: Sequence[str]) -> str | None:
    """Return the bundled features for such images; 8 x 8 grey ones of unknown class are digits."""
    for name, classes in BUNDLED.items():
        kind = KINDS[name]
        unknown = not class_names and name == "digits"
        if shape == (kind.channels, kind.size, kind.size) and (
            unknown or tuple(class_names) == tuple(classes())
        ):
            return name
    return None


def _default_reference(features: str, size: tuple[int, int], class_names: Sequence[str]) -> str:
    if features in BUNDLED:
        return f"{features}:report"
    ask = "reference is not set: expected an npz, a folder of real images, or digits:report"
    if len(class_names) != 1000 or size[0] != size[1] or size[0] not in ADM_FILES:
        raise ValueError(ask)
    file = ADM_FILES[size[0]]
    found = _downloaded(file)
    if found is None:
        raise ValueError(f"{ask}. For ImageNet it is {file}, {_sought(file)}")
    return found


def _located(source: str) -> str:
    """Return a reference; one of ADM's, or another bare file name, may lie among the weights.

    Raises:
        ValueError: a file of ADM's that is nowhere.
    """
    if Path(source).name != source or Path(source).exists():
        return source
    found = _downloaded(source)
    if found is None and source in ADM_PLACES:
        raise ValueError(f"reference={source}: no such file; also {_sought(source)}")
    return found or source


def _downloaded(file: str) -> str | None:
    places = (each / file for each in local_folders())
    return next((str(place) for place in places if place.is_file()), None)


def _sought(file: str) -> str:
    places = ", ".join(str(each.absolute()) for each in local_folders())
    return (
        f"looked for in {places} (${WEIGHTS_FOLDER} names a further folder); download "
        f"{ADM_FOLDER}/{ADM_PLACES[file]}/{file}"
    )


def _digest(reference: Reference) -> str:
    """Return a sha256 over the numbers that a reference holds."""
    digest = hashlib.sha256()
    for statistics in (reference.pool, reference.spatial):
        for tensor in () if statistics is None else (statistics.mean, statistics.covariance):
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    if reference.features is not None:
        digest.update(reference.features.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
