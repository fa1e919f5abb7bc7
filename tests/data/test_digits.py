"""The handwritten digits: their split is fixed, and their values are the original's."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import pytest
import torch
from sklearn.datasets import load_digits

from sag_dit.data.digits import CLASS_NAMES, Digits, digits

HELD_OUT = 719  # 40 per cent of 1,797
SPLIT_SHA256 = "5ec01223f2c3c2bcd018af773d2932c8f6296622052ae69a214d8c1ea76825d2"


@pytest.fixture(scope="module")
def held_out() -> list[int]:
    text = files("sag_dit.data").joinpath("digits_held_out.json").read_text()
    return list(json.loads(text))


def test_the_split_is_the_one_the_model_was_trained_with(held_out: list[int]) -> None:
    assert len(held_out) == len(set(held_out)) == HELD_OUT
    assert min(held_out) >= 0 and max(held_out) < 1797
    plain = ",".join(map(str, sorted(held_out)))
    assert hashlib.sha256(plain.encode()).hexdigest() == SPLIT_SHA256


def test_the_two_parts_are_disjoint_and_complete(held_out: list[int]) -> None:
    original = load_digits()
    mask = torch.zeros(1797, dtype=torch.bool)
    mask[held_out] = True
    for split, chosen in (("train", ~mask), ("held_out", mask)):
        images, labels = digits(split)
        assert images.shape == (int(chosen.sum()), 1, 8, 8)
        torch.testing.assert_close(labels, torch.from_numpy(original.target)[chosen].long())
        levels = images.double() * 16 / 255
        expected = torch.from_numpy(original.images)[chosen][:, None]
        torch.testing.assert_close(levels.round(), expected)


def test_the_split_is_stratified_by_class() -> None:
    train, held = (digits(split)[1].bincount(minlength=10) for split in ("train", "held_out"))
    share = held / (train + held)
    assert share.min() > 0.39 and share.max() < 0.41


def test_images_are_bytes_over_the_whole_range() -> None:
    images, labels = digits("train")
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 255)
    assert images.unique().tolist() == [round(255 * level / 16) for level in range(17)]
    assert len(CLASS_NAMES) == 10


def test_no_held_out_image_is_also_trained_on() -> None:
    """Not even as another index of the same drawing."""
    train, _ = digits("train")
    held, _ = digits("held_out")
    seen = {bytes(image.flatten().tolist()) for image in train}
    assert not [image for image in held if bytes(image.flatten().tolist()) in seen]


def test_batches_of_the_data_module_follow_seed_and_step() -> None:
    def first(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = next(iter(Digits(batch_size=32, seed=seed).train_dataloader()))
        return images, labels

    images, labels = first(0)
    assert images.shape == (32, 1, 8, 8) and images.dtype == torch.uint8
    torch.testing.assert_close(first(0), (images, labels), rtol=0, atol=0)
    assert not torch.equal(first(1)[0], images)
    # Images keep their labels: each pair is one of the training set.
    train_images, train_labels = digits("train")
    pairs = {
        (bytes(image.flatten().tolist()), int(label))
        for image, label in zip(train_images, train_labels, strict=True)
    }
    for image, label in zip(images, labels, strict=True):
        assert (bytes(image.flatten().tolist()), int(label)) in pairs


def test_validation_is_all_held_out_digits_in_one_order() -> None:
    batches = list(Digits().val_dataloader())
    images = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    expected = digits("held_out")
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])
