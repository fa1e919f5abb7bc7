"""What is added when every image is there: manifest, npz, gallery entries and their logging."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sag_dit.output.folder import (
    SampleFolder,
    gallery_entries,
    log_gallery,
    write_manifest,
    write_npz,
    write_png,
    write_views,
)
from sag_dit.sampling import Request
from sag_dit.traces import StepView

NAMES = ("tench", "goldfish", "日本の鯉")
REQUESTS = [Request(0, 5, 2, stream=0), Request(1, 5, 0, stream=1), Request(2, 5, 1, stream=2)]


def image(seed: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 6, channels), dtype=np.uint8)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def channels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def folder(tmp_path: Path, channels: int) -> SampleFolder:
    """Three images, the first of which has a twin and a view."""
    folder = SampleFolder(tmp_path)
    folder.claim({}, {})
    for request in REQUESTS:
        write_png(folder.image(request.index), image(request.index, channels))
    write_png(folder.twin(0), image(100, channels))
    saliency = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    write_views(folder.views(0), [StepView(0, 2, 999.0, saliency, saliency > 0.5, 0.5)])
    return folder


def test_manifest(folder: SampleFolder) -> None:
    file = write_manifest(folder, REQUESTS, NAMES)
    text = file.read_text(encoding="utf-8")
    assert "日本の鯉" in text  # readable as it is
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {
        "index": 0,
        "seed": 5,
        "stream": 0,
        "label": 2,
        "class": "日本の鯉",
        "file": "images/000000.png",
        "sha256": hashlib.sha256((folder.path / "images/000000.png").read_bytes()).hexdigest(),
    }
    assert [(row["index"], row["stream"], row["class"]) for row in rows[1:]] == [
        (1, 1, "tench"),
        (2, 2, "goldfish"),
    ]


def test_npz_is_in_the_order_of_the_requests(folder: SampleFolder, channels: int) -> None:
    file = write_npz(folder, REQUESTS[::-1])
    with np.load(file) as arrays:
        assert arrays.files == ["arr_0"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (3, 8, 6, 3)
    for row, request in enumerate(REQUESTS[::-1]):
        expected = np.broadcast_to(image(request.index, channels), (8, 6, 3))
        np.testing.assert_array_equal(images[row], expected)


def test_a_missing_or_broken_image_stops_the_npz(folder: SampleFolder) -> None:
    write_npz(folder, REQUESTS[:1])
    before = (folder.path / "samples.npz").read_bytes()
    folder.image(1).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"000001\.png cannot be read"):
        write_npz(folder, REQUESTS)
    assert (folder.path / "samples.npz").read_bytes() == before


def test_gallery_entries_pair_images_with_their_twins(folder: SampleFolder, channels: int) -> None:
    (entry,) = gallery_entries(folder, REQUESTS[:1], NAMES)
    assert (entry.index, entry.seed, entry.label) == (0, 5, "日本の鯉")
    np.testing.assert_array_equal(entry.guided, image(0, channels))
    np.testing.assert_array_equal(entry.unguided, image(100, channels))
    (view,) = entry.views
    assert (view.t, view.threshold) == (999.0, 0.5)


def test_loggers_without_tables_are_left_alone(folder: SampleFolder) -> None:
    class Plain:
        """Has nothing that could be called."""

    log_gallery(Plain(), gallery_entries(folder, REQUESTS[:1], NAMES), {"guidance": {}})
