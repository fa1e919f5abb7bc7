"""Aspect buckets: each image in the one of its aspect ratio, each batch of one of them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sag_dit.checkpoints import from_denoiser
from sag_dit.checkpoints.loading import at_size
from sag_dit.data.crop import buckets_by_rule, read_crop
from sag_dit.data.images import ImageFolderData
from sag_dit.data.training_batches import Batch, TrainingBatches, validation_batches
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from tests.data.making import picture, same, trainer, truncate

BUCKETS = ((8, 8), (6, 12), (12, 6))
COUNTS = (7, 4, 3)
"""Images of each bucket."""


def photos(root: Path, counts: tuple[int, ...] = COUNTS) -> Path:
    """Photos of two classes and three aspect ratios, none of the very ratio of its bucket."""
    number = 0
    for (height, width), count in zip(BUCKETS, counts, strict=True):
        for _ in range(count):
            name = ("cats", "dogs")[number % 3 == 2]
            (root / name).mkdir(parents=True, exist_ok=True)
            ending = "png" if number % 2 else "jpg"
            image = picture(3 * width + number % 2, 3 * height, seed=number)
            image.save(root / name / f"{number:02d}.{ending}")
            number += 1
    return root


def data_of(root: Path, **options: Any) -> ImageFolderData:
    known = {"size": 8, "batch_size": 4, "workers": 0, "buckets": BUCKETS}
    return ImageFolderData(root, **{**known, **options})


def model_of(network: torch.nn.Module) -> Any:
    return from_denoiser(ClassConditional(network, DDPM()), "tiny")  # type: ignore[arg-type]


def tiny(**options: Any) -> DiT:
    known = {"in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    return DiT(8, 2, **{**known, **options})


def steps(data: ImageFolderData, rank: int = 0, world: int = 1, first: int = 0) -> list[Any]:
    data.trainer = trainer(rank, world, first - 1)
    return [*islice(data.train_dataloader(), 9)]


counts = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(counts, st.integers(1, 12), st.integers(0, 10))
def test_each_bucket_has_its_share_of_an_epoch_and_all_its_images_equally_often(
    sizes: list[int], batch_size: int, seed: int
) -> None:
    of = np.repeat(np.arange(len(sizes)), sizes)[::-1].copy()
    chosen = np.arange(len(of)) + 100
    batches = TrainingBatches(chosen, batch_size, seed, flip=False, buckets=of)
    # Whole epochs, after each of which a bucket has had its share to a batch.
    epochs = 3
    taken = [epochs * count // batch_size for count in sizes]
    found = [batches.batch(step).indices for step in range(sum(taken))]
    buckets = [{int(of[index - 100]) for index in each} for each in found]
    assert all(len(each) == 1 for each in buckets)
    assert [sum(each == {b} for each in buckets) for b in range(len(sizes))] == taken
    seen = Counter(index for each in found for index in each)
    for bucket, count in enumerate(sizes):
        times = [seen[index] for index in chosen[of == bucket].tolist()]
        assert max(times) - min(times) <= 1 and len(times) == count
    # A step far away, asked alone.
    fresh = TrainingBatches(chosen, batch_size, seed, flip=False, buckets=of)
    assert fresh.batch(10**9) == batches.batch(10**9)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10), st.booleans())
def test_one_bucket_is_none(count: int, batch_size: int, seed: int, flip: bool) -> None:
    chosen = np.arange(count)
    plain = TrainingBatches(chosen, batch_size, seed, flip=flip)
    one = TrainingBatches(chosen, batch_size, seed, flip=flip, buckets=np.full(count, 3))
    assert [*map(plain.batch, range(30))] == [*map(one.batch, range(30))]


def test_the_turns_of_buckets_are_shuffled_by_the_seed_and_anew_every_epoch() -> None:
    of = np.repeat([0, 1], 40)
    batches, other = (
        TrainingBatches(np.arange(80), 4, seed, flip=False, buckets=of) for seed in (0, 1)
    )
    turns = [int(of[batches.batch(step).indices[0]]) for step in range(40)]
    first, second = turns[:20], turns[20:]
    assert sum(first) == sum(second) == 10
    assert first != second and first != sorted(first)
    assert first != [int(of[other.batch(step).indices[0]]) for step in range(20)]


def test_ranks_have_parts_of_one_bucket(tmp_path: Path) -> None:
    root = photos(tmp_path)
    whole = steps(data_of(root))
    halves = [steps(data_of(root), rank, 2) for rank in range(2)]
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        for both in zip(*halves, strict=True)
    ]
    assert same(whole, joined)
    assert {tuple(images.shape[1:]) for images, _ in whole} == {(3, *each) for each in BUCKETS}


def test_batches_do_not_depend_on_workers_or_resumption(tmp_path: Path) -> None:
    root = photos(tmp_path)
    whole = steps(data_of(root))
    assert same(whole, steps(data_of(root, workers=2)))
    assert same(whole[4:], steps(data_of(root), first=4)[:5])


def test_each_image_is_cropped_to_the_bucket_of_its_ratio(tmp_path: Path) -> None:
    data = data_of(photos(tmp_path))
    bucket_of = data.dataset.bucket_of
    assert np.bincount(bucket_of).tolist() == [*COUNTS]
    for index, bucket in enumerate(bucket_of.tolist()):
        crop = data.dataset.read(index)
        assert crop is not None
        assert np.array_equal(crop, read_crop(data.files.path(index), BUCKETS[bucket]))


def test_a_photo_on_its_side_is_put_where_it_belongs_upright(tmp_path: Path) -> None:
    note = Image.Exif()
    note[274] = 6
    for number, ending in enumerate(("jpg", "png", "webp", "tiff", "bmp")):
        noted = {} if ending == "bmp" else {"exif": note}
        picture(24, 12, number).save(tmp_path / f"{number}.{ending}", **noted)
    options = {"class_names": None, "batch_size": 1}
    upright = data_of(tmp_path, **options).dataset.bucket_of.tolist()
    assert upright == [2, 2, 2, 2, 1]
    as_it_is = data_of(tmp_path, upright=False, **options).dataset
    for index in range(5):
        crop = as_it_is.read(index)
        assert crop is not None
    # Pillow turns a TIFF whether it is asked to or not.
    assert as_it_is.bucket_of.tolist() == [1, 1, 1, 2, 1]


def test_an_image_that_cannot_be_read_gives_way_to_one_of_its_bucket(tmp_path: Path) -> None:
    root = photos(tmp_path)
    cut, gone = root / "cats" / "07.png", root / "cats" / "00.jpg"
    truncate(cut)
    gone.write_bytes(b"no image")
    data = data_of(root)
    crops = data.dataset
    names = list(data.files.names)
    assert crops.bucket_of[names.index("cats/00.jpg")] == 0
    images, _ = crops.__getitems__(Batch(0, [names.index("cats/07.png")], [False]))
    assert images.shape[2:] == BUCKETS[1]
    assert {"cats/00.jpg", "cats/07.png"} == {*crops.skipped}
    assert len(steps(data)) == 9


def test_held_out_images_are_validated_with_bucket_by_bucket(tmp_path: Path) -> None:
    root = photos(tmp_path, (12, 9, 7))
    data = data_of(root, held_out=0.5)
    data.trainer = trainer()
    found = [*data.val_dataloader()]
    assert sum(len(labels) for _, labels in found) == data.held_out_images.sum()
    assert {tuple(images.shape[2:]) for images, _ in found} == {*BUCKETS}
    of, chosen = np.repeat([0, 1, 2], [5, 1, 4]), np.arange(10)
    ranks = [validation_batches(chosen, 2, rank, 3, of) for rank in range(3)]
    assert len({len(each) for each in ranks}) == 1
    for steps_here in zip(*ranks, strict=True):
        assert len({(len(b.indices), of[b.indices[0]], b.step) for b in steps_here}) == 1
    assert {i for each in ranks for b in each for i in b.indices} == {*range(10)}


def test_balance_holds_with_buckets(tmp_path: Path) -> None:
    data = data_of(photos(tmp_path), balance=1.0)
    repeated = Counter(data.training_images.tolist())
    buckets = data.buckets_of(data.training_images)
    batches = TrainingBatches(data.training_images, 4, 0, flip=False, buckets=buckets)
    epochs = 40
    total = epochs * len(data.training_images) // 4 - 3
    seen = Counter(i for step in range(total) for i in batches.batch(step).indices)
    for index, times in repeated.items():
        assert abs(seen[index] / epochs - times) <= 0.2 * times


def test_a_model_draws_at_a_bucket_with_the_positions_it_was_trained_with() -> None:
    network = tiny().eval()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    x, t, y = torch.randn(2, 3, 6, 12), torch.tensor([5, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        trained = network(x, t, y)
        resized = at_size(ClassConditional(network, DDPM()), (6, 12))
        assert torch.equal(resized.network(x, t, y), trained)
    assert resized.latent_shape == (3, 6, 12)
    assert resized.network.arguments["input_size"] == [6, 12]
    assert {layer.grid for layer in resized.layers.values()} == {(3, 6)}
    small = {"model_channels": 32, "num_heads": 1, "num_res_blocks": 1, "channel_mult": [1, 2]}
    unet = ClassConditional(UNet(8, attention_resolutions=[4], **small), DDPM())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text.size=\[6,12\]: a UNet draws images of its own si"):
        at_size(unet, (6, 12))


def test_the_rule_is_that_of_kohya() -> None:
    # What its make_bucket_resolutions((512, 512), 256, 1024, 64) gives, as widths and heights.
    known = (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640)
    known += ((448, 576),)
    both = {*known, *((high, wide) for wide, high in known), (512, 512)}
    found = buckets_by_rule(512, 64)
    assert {*found} == both and found[0] == (512, 512) and len(found) == len(both)
    for high, wide in buckets_by_rule([192, 320], 16)[1:]:
        assert high % 16 == wide % 16 == 0 and high * wide <= 192 * 320
    assert buckets_by_rule([192, 320], 16)[0] == (192, 320)


def test_report_tells_the_buckets(tmp_path: Path) -> None:
    told = data_of(photos(tmp_path)).report().splitlines()
    assert "  buckets  8 (7), [6,12] (4), [12,6] (3)" in told
    assert any(
        each.startswith("  note: [12,6]: fewer images than a batch of 4, so that it has some")
        for each in told
    )


@pytest.mark.parametrize(
    ("buckets", "told"),
    [
        ([[6, 12], [12, 6]], "data.buckets: 8 is not among them: expected it too, the resolution"),
        ([[8, 8], [16, 16]], "8 and 16 have one aspect ratio, by which"),
        ([[8, 8], [8]], r"\[8\]: expected \[height, width\]"),
        (0, "data.buckets=0: expected 1 or more pixels"),
    ],
)
def test_buckets_that_cannot_be_are_told(buckets: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        data_of(photos(tmp_path), buckets=buckets)


def test_buckets_are_checked_against_the_network_before_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path)
    monkeypatch.setattr("sag_dit.data.images.read_header", lambda path: pytest.fail("read"))
    data_of(root).check(model_of(tiny()))
    with pytest.raises(ValueError, match=r"\[6,13\] are no multiples of 2 pixels, the autoenc"):
        data_of(root, buckets=[[8, 8], [6, 13]]).check(model_of(tiny()))
    with pytest.raises(ValueError, match=r"data.buckets=3: .* expected a multiple of 2"):
        data_of(root, buckets=3).check(model_of(tiny()))

    class OneSize(DiT):
        any_size = False

    network = OneSize(8, 2, 3, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    with pytest.raises(ValueError, match="OneSize takes images of one size: expected null"):
        data_of(root).check(model_of(network))
