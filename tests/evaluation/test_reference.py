"""References from every kind of source, what stands beside them, and the cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from sag_dit.evaluation.features import Features
from sag_dit.evaluation.images import Source
from sag_dit.evaluation.metrics import Moments
from sag_dit.evaluation.reference import Reference, load_reference
from tests.evaluation.making import Tiny, pixels

IMAGES = pixels(30, 0)
LABELS = torch.arange(30) % 3


class Adm(Tiny):
    """The network that ADM's statistics belong to, as far as the reader can tell."""

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        self.protocol = {**self.protocol, "adm_statistics": True}


class Counting(Tiny):
    """Counts the images it is shown."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.shown = 0

    def forward(self, images: Tensor) -> Features:
        self.shown += len(images)
        return super().forward(images)


def write_npz(file: Path, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


def write_folder(folder: Path, images: Tensor, labels: Tensor | None = None) -> Path:
    for index, image in enumerate(images):
        home = folder if labels is None else folder / f"class{int(labels[index])}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(home / f"{index:06d}.png")
    return folder


def nhwc(images: Tensor) -> np.ndarray[Any, Any]:
    return images.permute(0, 2, 3, 1).numpy()


def sources(tmp_path: Path) -> dict[str, Source]:
    return {
        "npz": write_npz(tmp_path / "set.npz", arr_0=nhwc(IMAGES), arr_1=LABELS.numpy()),
        "folder": write_folder(tmp_path / "flat", IMAGES),
        "tensors": (IMAGES, LABELS),
        "dataset": TensorDataset(IMAGES, LABELS),
    }


@pytest.mark.parametrize("kind", ["npz", "folder", "tensors", "dataset"])
def test_every_source_gives_the_same_statistics(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[kind]
    found = load_reference(source, Tiny(), batch_size=7, cache=None)
    with torch.no_grad():
        seen = Tiny()(IMAGES)
    assert found.count == 30
    assert found.pool is not None and found.spatial is not None and found.features is not None
    torch.testing.assert_close(found.pool.mean, seen.pool.double().mean(0))
    torch.testing.assert_close(found.pool.covariance, seen.pool.double().T.cov())
    assert seen.spatial is not None
    torch.testing.assert_close(found.spatial.covariance, seen.spatial.double().T.cov())
    torch.testing.assert_close(found.features, seen.pool)
    labels = {"classes": 3, "fewest": 10, "most": 10}
    assert found.protocol["labels"] == (None if kind == "folder" else labels)
    assert found.protocol["image_size"] == [1, 8, 8]
    assert found.protocol["network"] == {
        "name": "tiny",
        "weights": "seed 0",
        "range": "x / 255",
    }
    json.dumps(dict(found.protocol))


def test_split_of_a_data_set_is_a_reference() -> None:
    found = load_reference("digits:report", Tiny(), cache=None)
    assert (found.name, found.count) == ("digits:report", 357)
    assert found.protocol["labels"] == {"classes": 10, "fewest": 35, "most": 36}


def test_features_kept_are_evenly_spaced() -> None:
    found = load_reference((IMAGES, LABELS), Tiny(), features=10, cache=None)
    every = load_reference((IMAGES, LABELS), Tiny(), cache=None)
    assert found.features is not None and every.features is not None
    torch.testing.assert_close(found.features, every.features[::3])
    assert found.protocol["features"] == 10
    assert found.count == 30


def adm_file(file: Path, images: Tensor | None) -> Path:
    random = np.random.Generator(np.random.Philox(key=[9, 0]))
    arrays = {
        "mu": random.random(16),
        "sigma": np.cov(random.random((16, 99))),
        "mu_s": random.random(6),
        "sigma_s": np.cov(random.random((6, 99))),
    }
    if images is not None:
        arrays["arr_0"] = nhwc(images)
    return write_npz(file, **arrays)


def test_adms_file_gives_its_statistics_to_its_network(tmp_path: Path) -> None:
    file = adm_file(tmp_path / "VIRTUAL_test.npz", IMAGES)
    found = load_reference(file, Adm(), cache=None)
    with np.load(file, allow_pickle=False) as arrays:
        for own, mu, sigma in ((found.pool, "mu", "sigma"), (found.spatial, "mu_s", "sigma_s")):
            assert own is not None and own.number is None
            np.testing.assert_array_equal(own.mean.numpy(), arrays[mu])
            np.testing.assert_array_equal(own.covariance.numpy(), arrays[sigma])
    assert found.features is not None and len(found.features) == found.count == 30
    assert found.protocol["statistics"] == "of the file"
    assert found.protocol["sample_count"] == 50_000


def test_adms_statistics_are_not_given_to_another_network(tmp_path: Path) -> None:
    file = adm_file(tmp_path / "VIRTUAL_test.npz", IMAGES)
    found = load_reference(file, Tiny(), cache=None)
    expected = load_reference((IMAGES, LABELS), Tiny(), cache=None)
    assert found.pool is not None and expected.pool is not None
    torch.testing.assert_close(found.pool.covariance, expected.pool.covariance)
    assert found.protocol["statistics"] == "of the images"
    assert found.protocol["sample_count"] is None
    alone = adm_file(tmp_path / "alone.npz", None)
    with pytest.raises(ValueError, match="but no images, and the network is tiny"):
        load_reference(alone, Tiny(), cache=None)
    without_images = load_reference(alone, Adm(), cache=None)
    assert without_images.features is None and without_images.count == 0
    assert without_images.pool is not None


def cached(source: Source, extractor: Counting, cache: Path, **options: int) -> Reference:
    return load_reference(source, extractor, cache=cache, **options)


def test_cache_goes_by_content_and_preprocessing(tmp_path: Path) -> None:
    extractor, cache = Counting(), tmp_path / "cache"
    first = cached((IMAGES, LABELS), extractor, cache)
    again = cached(TensorDataset(IMAGES, LABELS), extractor, cache)
    assert extractor.shown == 30
    assert first.pool is not None and again.pool is not None
    assert torch.equal(first.pool.covariance, again.pool.covariance)
    assert again.pool.number == 30
    assert first.protocol["sha256"] == again.protocol["sha256"]
    assert first.features is not None and again.features is not None
    assert torch.equal(first.features, again.features)
    changed = IMAGES.clone()
    changed[4, 0, 0, 0] += 1
    cached((changed, LABELS), extractor, cache)
    assert extractor.shown == 60
    cached((IMAGES, LABELS), extractor, cache, features=5)
    assert extractor.shown == 90
    other = Counting(seed=1)
    cached((IMAGES, LABELS), other, cache)
    assert other.shown == 30


def test_damaged_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extractor, cache = Counting(), tmp_path / "cache"
    cached((IMAGES, LABELS), extractor, cache)
    (file,) = (cache / "references").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        cached((IMAGES, LABELS), extractor, cache)
    assert extractor.shown == 60
    assert "made again" in caplog.text
    cached((IMAGES, LABELS), extractor, cache)
    assert extractor.shown == 60


def test_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "there"))
    load_reference((IMAGES, LABELS), Tiny())
    assert len(list((tmp_path / "there" / "references").iterdir())) == 1


def test_one_image_is_no_reference() -> None:
    with pytest.raises(ValueError, match="has 1 images: expected 2 or more"):
        load_reference((IMAGES[:1], LABELS[:1]), Tiny(), cache=None)


def test_moments_of_a_reference_are_not_summed_over_ranks() -> None:
    """Every rank reads the whole reference, so making one must not sync."""
    metric = Moments()
    metric.update(torch.rand(5, 2))
    assert metric.statistics().number == 5
