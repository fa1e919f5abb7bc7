"""Crops of photographs: what is held out is never trained on, and every crop is where it says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sag_dit.checkpoints import Model, build, from_denoiser
from sag_dit.data import patches as module
from sag_dit.data.patches import (
    CLASS_NAMES,
    HELD_OUT_QUARTERS,
    Patches,
    Split,
    held_out_places,
    patches,
    photographs,
    quarter,
    training_places,
)

SIDE, SIZE = 288, 32
# The photographs that the bundled model and classifier were trained on, file after file.
PHOTOGRAPHS_SHA256 = "5914b14045cb23061ebd78fb22be6ff7cc9c92a0494fb82ea4ae5420d5c3ace4"


def covered(places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(14, 288, 288): which pixels some crop shows."""
    steps = np.zeros((len(CLASS_NAMES), SIDE + 1, SIDE + 1), dtype=np.int64)
    label, row, column = places.T
    for sign, down, right in ((1, 0, 0), (-1, SIZE, 0), (-1, 0, SIZE), (1, SIZE, SIZE)):
        np.add.at(steps, (label, row + down, column + right), sign)
    return steps.cumsum(1).cumsum(2)[:, :SIDE, :SIDE] > 0


def quarters() -> NDArray[np.bool_]:
    """(14, 288, 288): which pixels are held out, from what the table says in words."""
    upper = np.arange(SIDE) < SIDE // 2
    masks = []
    for _, where in HELD_OUT_QUARTERS.values():
        vertical, horizontal = where.split()
        rows = upper if vertical == "upper" else ~upper
        columns = upper if horizontal == "left" else ~upper
        masks.append(rows[:, None] & columns)
    return np.stack(masks)


def test_training_shows_every_pixel_outside_the_held_out_quarters_and_none_within() -> None:
    assert np.array_equal(covered(training_places()), ~quarters())


def test_training_knows_every_place_outside_the_quarter_once() -> None:
    places = training_places()
    assert np.bincount(np.ravel_multi_index(tuple(places.T), (14, SIDE, SIDE))).max() == 1
    # All corners, less those within 31 pixels before the quarter's edge or in it.
    assert np.bincount(places[:, 0]).tolist() == [257**2 - 144**2] * 14


def test_held_out_crops_stay_within_their_quarter_and_their_half() -> None:
    shown = {split: covered(held_out_places(split)) for split in ("held_out", "tune", "report")}
    assert not (shown["held_out"] & ~quarters()).any()
    assert not (shown["tune"] & shown["report"]).any()
    assert np.array_equal(shown["held_out"], shown["tune"] | shown["report"])
    # At most two pixels are left over at the edge of a block of 72.
    assert shown["held_out"].sum() == 14 * 4 * 72**2


@pytest.mark.parametrize(("split", "each"), [("held_out", 100), ("tune", 50), ("report", 50)])
def test_crops_are_cut_where_their_places_say(split: Split, each: int) -> None:
    images, labels = patches(split)
    assert images.shape == (14 * each, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [each] * 14
    for index in range(0, len(labels), 97):
        label, row, column = held_out_places(split)[index]
        expected = photographs()[label, :, row : row + SIZE, column : column + SIZE]
        assert np.array_equal(images[index], expected) and labels[index] == label


def test_the_photographs_are_those_that_the_weights_were_trained_on() -> None:
    digest = hashlib.sha256()
    for file, _ in HELD_OUT_QUARTERS.values():
        package, *path = file.split("/")
        digest.update(files(package).joinpath(*path).read_bytes())
    assert digest.hexdigest() == PHOTOGRAPHS_SHA256
    grey = [
        (photo[0] == photo[1]).all() and (photo[0] == photo[2]).all() for photo in photographs()
    ]
    assert [name for name, is_grey in zip(CLASS_NAMES, grey, strict=True) if is_grey] == [
        "brick",
        "grass",
        "gravel",
        "moon",
    ]
    assert quarter("china") == (0, 0) and quarter("retina") == (144, 0)


def take(count: int, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(islice(Patches(8, **options).train_dataloader(), count))


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_batches_follow_seed_and_step_alone() -> None:
    first = take(3, seed=5)
    assert first[0][0].shape == (8, 3, 32, 32) and first[0][0].dtype == torch.uint8
    assert_equal(take(3, seed=5), first)
    assert_equal(take(3, seed=5, workers=1), first)
    assert not torch.equal(take(1, seed=6)[0][0], first[0][0])
    assert not torch.equal(first[1][0], first[0][0])


def test_a_resumed_run_goes_on_with_the_batches_it_would_have_had() -> None:
    class Loop:
        total_batch_idx = 1  # two batches are done

    class Trainer:
        fit_loop, world_size, global_rank, overfit_batches = Loop(), 1, 0, 0

    data = Patches(8, seed=5)
    data.trainer = Trainer()  # type: ignore[assignment]
    assert_equal(next(iter(data.train_dataloader())), take(3, seed=5)[2])


def test_half_of_the_crops_are_mirrored_and_nothing_else_changes() -> None:
    plain, flipped = (next(iter(Patches(256, flip=flip).train_dataloader())) for flip in (0, 1))
    assert_equal(plain[1], flipped[1])
    same = (plain[0] == flipped[0]).flatten(1).all(1)
    mirrored = (plain[0] == flipped[0].flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 90 < (~same).sum() < 166


def test_validation_is_all_held_out_crops_in_one_order() -> None:
    batches = list(Patches(512).val_dataloader())
    expected = patches("held_out")
    for part in (0, 1):
        assert torch.equal(torch.cat([batch[part] for batch in batches]), expected[part])


@pytest.fixture
def no_photographs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module.photographs.cache_clear()
    yield
    module.photographs.cache_clear()


@pytest.mark.parametrize("file", ["no_such_package/data/moon.png", "skimage/data/no_such.png"])
@pytest.mark.usefixtures("no_photographs")
def test_missing_photographs_name_the_remedy(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HELD_OUT_QUARTERS, "moon", (file, "upper right"))
    with pytest.raises(ValueError, match=rf"{file}.*pip install -e '\.\[eval\]'"):
        Patches()


def model(**changes: Any) -> Model:
    network = {
        "input_size": 32,
        "patch_size": 8,
        "in_channels": 3,
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 1,
        "mlp_ratio": 1.0,
        "class_dropout_prob": 0.1,
        "num_classes": 14,
        "learn_sigma": False,
    }
    description = {
        "model": network | changes,
        "process": {"schedule": "cosine", "num_timesteps": 1000},
        "kind": "v",
        "x_0_range": [-1.0, 1.0],
        "class_names": [],
    }
    return from_denoiser(build(description), "small")


def test_a_model_of_other_images_or_classes_is_refused() -> None:
    data = Patches()
    data.check(model())
    with pytest.raises(ValueError, match=r"\(1, 32, 32\).*set resolution=32"):
        data.check(model(in_channels=1))
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*set resolution=32"):
        data.check(model(input_size=16))
    with pytest.raises(ValueError, match="14 classes and the model 10"):
        data.check(model(num_classes=10))
