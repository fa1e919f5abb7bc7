"""Images held out for validation: chosen by name, and shared between ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sag_dit.data.images import ImageFolderData
from sag_dit.data.training_batches import HASH_RANGE, held_out, name_hash, validation_batches
from tests.data.making import image_folder, picture, same, trainer


def hashes(count: int) -> np.ndarray:
    return np.array([name_hash(f"class/{i}.jpg") for i in range(count)], dtype=np.int64)


def test_share_is_about_as_asked() -> None:
    chosen = held_out(hashes(4000), np.zeros(4000, dtype=np.int64), 0.1)
    assert 340 < chosen.sum() < 460
    assert not held_out(hashes(4000), np.zeros(4000, dtype=np.int64), 0.0).any()


def test_further_images_move_none() -> None:
    labels = np.arange(300) % 3
    few, many = held_out(hashes(200), labels[:200], 0.2), held_out(hashes(300), labels, 0.2)
    np.testing.assert_array_equal(few, many[:200])


def test_every_class_keeps_an_image_and_one_is_held_out() -> None:
    labels = np.array([0, 1, 1, 2])
    chosen = held_out(hashes(4), labels, 0.999)
    assert chosen.sum() == 1 and chosen[1:3].sum() == 1
    low = np.array([5, HASH_RANGE - 3, HASH_RANGE - 2, HASH_RANGE - 1], dtype=np.int64)
    np.testing.assert_array_equal(held_out(low, labels, 1e-9), [False, True, False, False])
    with pytest.raises(ValueError, match="no class has more than one image"):
        held_out(hashes(2), np.array([0, 1]), 0.5)


def test_no_image_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path, each=8)
    data = ImageFolderData(root, 16, 6, flip=False, held_out=0.3, workers=0)
    held = {image.numpy().tobytes() for images, _ in data.val_dataloader() for image in images}
    assert held and len(held) == data.held_out_images.sum()
    trained = set()
    for step, (images, _) in enumerate(data.train_dataloader()):
        trained |= {image.numpy().tobytes() for image in images}
        if step == 20:
            break
    assert not trained & held and len(trained | held) == 16
    assert ImageFolderData(root, 16, 8).val_dataloader() == []


def test_names_decide_not_the_place_of_the_folder(tmp_path: Path) -> None:
    one = ImageFolderData(image_folder(tmp_path / "a", each=8), 16, 2, held_out=0.3)
    other = ImageFolderData(image_folder(tmp_path / "b", each=8), 16, 2, held_out=0.3)
    np.testing.assert_array_equal(one.held_out_images, other.held_out_images)
    before = {name for name, out in zip(one.files.names, one.held_out_images, strict=True) if out}
    picture(20, 20).save(tmp_path / "a" / "cats" / "000.png")
    more = ImageFolderData(tmp_path / "a", 16, 2, held_out=0.3)
    after = {name for name, out in zip(more.files.names, more.held_out_images, strict=True) if out}
    assert after - {"cats/000.png"} == before


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_validate_all_images_in_equally_many_batches(world: int) -> None:
    chosen = np.array([3, 5, 8, 13, 21])
    shares = [validation_batches(chosen, 2, rank, world) for rank in range(world)]
    assert len({tuple(len(batch.indices) for batch in share) for share in shares}) == 1
    assert {i for share in shares for batch in share for i in batch.indices} == set(chosen.tolist())
    assert not any(any(batch.mirrored) for share in shares for batch in share)
    assert len({batch.step for batch in shares[0]}) == len(shares[0])


def test_validation_is_the_same_every_time(tmp_path: Path) -> None:
    data = ImageFolderData(image_folder(tmp_path, each=8), 16, 4, held_out=0.5, workers=0)
    data.trainer = trainer(world=2)
    one, other = list(data.val_dataloader()), list(data.val_dataloader())
    assert same(one, other)
