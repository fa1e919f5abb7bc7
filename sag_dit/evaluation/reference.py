"""References: the real images that samples are compared with, reduced to what metrics need."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sag_dit.data.crop import WHITE
from sag_dit.evaluation.features import FeatureExtractor, exact
from sag_dit.evaluation.images import ImageSet, Source, open_images, read_statistics
from sag_dit.evaluation.metrics import Moments, Statistics
from sag_dit.files import atomic, default_cache
from sag_dit.tensors import home_of_doubles

if TYPE_CHECKING:
    from sag_dit.evaluation.ratios import FeatureSpace

ADM_SAMPLES = 50_000
"""With so many samples are numbers against ADM's reference files published."""
LAYOUT = 1
"""Changes when what a cached file holds changes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What metrics need of a reference.

    Attributes:
        name: what it is called.
        count: images it has; 0 where a file holds statistics alone.
        pool: statistics of pooled features.
        spatial: statistics of spatial features, None if the network has none.
        features: pooled features (m, d) for metrics that compare images one by one, at most as
            many as asked for.
        protocol: all that changes a number, as plain JSON values: the extractor's protocol, source,
            sha256, counts, image size, label balance.
        notes: sentences to stand beside numbers, such as which files were left out.
        spaces: of fdr, what other networks say of the same images; None if it is not measured.

    Example::

        reference = load_reference("digits:report", extractor)
        print(reference.count, reference.protocol["network"])
    """

    name: str
    count: int
    pool: Statistics | None
    spatial: Statistics | None
    features: Float[Tensor, "m d"] | None
    protocol: Mapping[str, Any]
    notes: Sequence[str] = ()
    spaces: Sequence[FeatureSpace] | None = None

    def check(self, extractor: FeatureExtractor) -> None:
        """Check that the reference was made with an extractor.

        Raises:
            ValueError: it was made with another, or with other preprocessing; the difference is
                named.
        """
        own, other = self.protocol["network"], description_of(extractor)
        differences = [
            f"{key} {own.get(key)!r} and {other.get(key)!r}"
            for key in sorted(own.keys() | other.keys())
            if own.get(key) != other.get(key)
        ]
        if differences:
            raise ValueError(
                f"{self.name} was made with another network than the images are read with: "
                f"{'; '.join(differences)}; expected one network for both"
            )


def description_of(extractor: FeatureExtractor) -> dict[str, Any]:
    """Return an extractor's name and protocol as JSON values."""
    told = {"name": extractor.name, **extractor.protocol}
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def load_reference(
    source: Source,
    extractor: FeatureExtractor,
    *,
    name: str | None = None,
    batch_size: int = 64,
    features: int = 10_000,
    size: int | None = None,
    background: str = WHITE,
    sample_count: int | None = None,
    cache: str | Path | None = "auto",
) -> Reference:
    """Read a reference: an npz, a folder of images, ``digits:held_out`` or a dataset.

    An npz with ``mu`` and ``sigma`` (and ``mu_s``, ``sigma_s``), such as ADM's VIRTUAL_*.npz, holds
    statistics made with ADM's Inception. They are used if ``extractor`` is that network. Everything
    else is computed from the images. For metrics that compare images one by one ``features``
    vectors are kept, evenly spaced over the images; ADM takes all 10,000 of its file. ``size``
    crops images to squares as ADM does, ``background`` is the colour behind what is transparent.
    ``sample_count`` is the number of samples with which numbers against this reference are
    published; for ADM's files it is known.

    What was made from images is kept in the folder ``cache``, and found again by the images'
    content and the network's protocol. ``auto`` is $SAG_DIT_CACHE or ~/.cache/sag_dit, None is
    nowhere.

    Raises:
        ValueError: the source is not readable, or holds neither images nor fitting statistics.
    """
    # Statistics that the file holds, if they are of this network.
    given = read_statistics(source) if isinstance(source, (str, Path)) else None
    fits = given is not None and bool(extractor.protocol.get("adm_statistics"))
    if given is not None and not given.has_images and not fits:
        raise ValueError(
            f"reference={source}: it holds statistics of ADM's Inception but no images, and the "
            f"network is {extractor.name}; expected images, or the network `inception`"
        )
    # What is made from the images, where there are any: now, or by an earlier run.
    images = None
    if given is None or given.has_images:
        images = open_images(source, size=size, background=background)
    made: _Made | None = None
    content: dict[str, Any] = {}
    if images is not None:
        content = {
            "sha256": images.digest(),
            "image_size": list(images.shape),
            "labels": images.balance(),
            **images.protocol,
        }
        made = _cached(images, content["sha256"], extractor, batch_size, features, cache)
    # All that changes a number, to stand beside the numbers.
    protocol: dict[str, Any] = {
        "reference": name or (images.name if images else Path(str(source)).name),
        "count": len(images) if images else 0,
        "statistics": "of the file" if fits else "of the images",
        "features": 0 if made is None else len(made.features),
        "sample_count": sample_count or (ADM_SAMPLES if fits else None),
        "network": description_of(extractor),
        **content,
    }
    # The file's own statistics go before those of its images.
    told = given if fits else made
    return Reference(
        name=protocol["reference"],
        count=protocol["count"],
        pool=None if told is None else told.pool,
        spatial=None if told is None else told.spatial,
        features=None if made is None else made.features,
        protocol=protocol,
        notes=images.notes if images else (),
    )


@dataclass(frozen=True)
class _Made:
    pool: Statistics
    spatial: Statistics | None
    features: Tensor


def _make(images: ImageSet, extractor: FeatureExtractor, batch_size: int, features: int) -> _Made:
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} images: expected 2 or more")
    tensors = (*extractor.parameters(), *extractor.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    extractor = extractor.eval()
    # Vectors of so many images are kept, evenly spaced over all.
    count = min(features, len(images))
    kept = torch.arange(count) * len(images) // max(1, count)
    # One pass over the images: sums for the statistics, and the vectors to keep.
    home = home_of_doubles(device)
    pool, spatial = Moments().to(home), Moments().to(home)
    vectors, place = [], 0
    for batch, _ in images.read(batch_size):
        with exact(device):
            seen = extractor(batch.to(device))
        pool.update(seen.pool.to(home))
        if seen.spatial is not None:
            spatial.update(seen.spatial.to(home))
        places = torch.arange(place, place + len(batch))
        place += len(batch)
        vectors.append(seen.pool.cpu()[torch.isin(places, kept)].float())
    # Every rank reads a reference for itself, so the sums of this one are the whole.
    return _Made(
        _on_cpu(pool.statistics()),
        _on_cpu(spatial.statistics()) if spatial.update_called else None,
        torch.cat(vectors),
    )


def _on_cpu(statistics: Statistics) -> Statistics:
    return Statistics(statistics.number, statistics.mean.cpu(), statistics.covariance.cpu())


def _cached(
    images: ImageSet,
    digest: str,
    extractor: FeatureExtractor,
    batch_size: int,
    features: int,
    cache: str | Path | None,
) -> _Made:
    """Return what was made of these images before, or make it and keep it."""
    if cache is None:
        return _make(images, extractor, batch_size, features)
    key = json.dumps([LAYOUT, digest, description_of(extractor), features], sort_keys=True)
    folder = (default_cache() if cache == "auto" else Path(cache).expanduser()) / "references"
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if file.is_file():
        try:
            return _read_made(file)
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("%s cannot be read (%s); made again", file, error)
    made = _make(images, extractor, batch_size, features)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(file) as temporary:
            safetensors.torch.save_file(_tensors(made), temporary, {"key": key})
    except OSError as error:
        log.warning("%s: the reference's statistics could not be kept (%s)", file, error)
    return made


def _tensors(made: _Made) -> dict[str, Tensor]:
    tensors = {"features": made.features.contiguous()}
    for name, statistics in (("pool", made.pool), ("spatial", made.spatial)):
        if statistics is not None:
            tensors[f"{name}.number"] = torch.tensor(statistics.number)
            tensors[f"{name}.mean"] = statistics.mean.contiguous()
            tensors[f"{name}.covariance"] = statistics.covariance.contiguous()
    return tensors


def _read_made(file: Path) -> _Made:
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())

        def statistics(name: str) -> Statistics:
            number, mean, covariance = (
                stored.get_tensor(f"{name}.{part}") for part in ("number", "mean", "covariance")
            )
            return Statistics(int(number), mean, covariance)

        return _Made(
            statistics("pool"),
            statistics("spatial") if "spatial.mean" in names else None,
            stored.get_tensor("features"),
        )
