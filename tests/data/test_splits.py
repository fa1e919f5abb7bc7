"""Named splits: the halves of what is held out share nothing, and are alike."""

from __future__ import annotations

import pytest
import torch

from sag_dit.data.splits import SPLITS, split


def rows(name: str) -> list[bytes]:
    return [image.numpy().tobytes() for image in split(name)[0]]


def test_the_halves_of_the_digits_are_disjoint_complete_and_balanced() -> None:
    tune, report = rows("digits:tune"), rows("digits:report")
    assert sorted(tune + report) == sorted(rows("digits:held_out"))
    assert not set(tune) & set(report)
    counts = [split(f"digits:{half}")[1].bincount() for half in ("tune", "report")]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert (len(tune), len(report)) == (362, 357)


def test_no_split_shares_an_image_with_the_training_part() -> None:
    assert not set(rows("digits:train")) & set(rows("digits:held_out"))


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_uint8_images_with_labels_and_the_same_at_every_call(name: str) -> None:
    images, labels = split(name)
    assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(labels)
    again = split(name)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])


def test_an_unknown_split_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'digits:test'.*digits:tune, digits:report"):
        split("digits:test")
