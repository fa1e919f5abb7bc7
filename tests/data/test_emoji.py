"""The bundled emoji: families stand on one side, mirror images are right, and all is repeatable."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.emoji_data import CLASSES, Emoji, class_of, family, normal, parse, splits
from sag_dit.codec import IdentityCodec
from sag_dit.data import emoji as module
from sag_dit.data.crop import read_crop
from sag_dit.data.emoji import EmojiData, all_emoji, emoji, mirrorable, write_images
from sag_dit.data.images import find_images
from tests.conftest import MakeDiT

# The images that the bundled model is trained on, as Pillow decodes them.
FILE_SHA256 = "20f924e4523e7a5dc2ad37a8b3b38e89944b4625648cd3173cbcb33c3643459d"

LINES = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # X E1.0 grinning face
# subgroup: sky & weather
2600 FE0F                                  ; fully-qualified     # X E0.6 sun
2600                                       ; unqualified         # X E0.6 sun
"""


def test_there_are_as_many_as_the_sources_hold_in_thirty_one_classes() -> None:
    table = all_emoji()
    assert hashlib.sha256(module.FILE.read_bytes()).hexdigest() == FILE_SHA256
    assert table.images.shape == (3377, 3, 64, 64) and table.images.dtype == np.uint8
    assert len(table.class_names) == 31 and list(table.class_names) == sorted(CLASSES)
    assert len(set(table.codes)) == len(table.codes) == len(table.names) == len(table.labels)
    assert np.bincount(table.labels).min() == 12
    assert module.FILE.stat().st_size < 4e6


def test_names_tell_what_the_images_show() -> None:
    table = all_emoji()
    place = table.codes.index("1f34e")
    assert table.names[place] == "red apple"
    assert table.class_names[table.labels[place]] == "fruit or vegetable"
    red, green, _ = table.images[place][:, 24:48, 24:40].reshape(3, -1).mean(1)
    assert red > green + 50
    assert table.images[place][:, :4, :4].min() > 240


def test_no_family_stands_on_two_sides() -> None:
    table = all_emoji()
    sides: dict[str, set[str]] = {}
    for each, side in zip(table.families, table.splits.tolist(), strict=True):
        sides.setdefault(each, set()).add(side)
    assert all(len(each) == 1 for each in sides.values())
    tones = [i for i, name in enumerate(table.names) if name.endswith("medium skin tone")]
    assert len(tones) > 250
    for i in tones:
        plain = table.names.index(table.names[i].removesuffix(": medium skin tone"))
        assert table.splits[i] == table.splits[plain]


def test_every_class_is_on_every_side_and_most_are_to_train_on() -> None:
    table = all_emoji()
    counts = [len(table.places(side)) for side in ("train", "tune", "report")]  # type: ignore[arg-type]
    assert sum(counts) == len(table.codes) and counts[0] > 0.8 * sum(counts)
    assert min(counts[1:]) > 250
    for side in ("train", "tune", "report"):
        assert set(emoji(side)[1].tolist()) == set(range(31))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1f468-1f3fd-200d-2708-fe0f", "1f9d1-200d-2708-fe0f"),  # man, medium tone; person: pilot
        ("1f44d-1f3ff", "1f44d"),
        ("1f3c3-200d-2640-fe0f", "1f3c3"),
        ("1f46b-1f3fb", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff"),
        ("1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"),
    ],
)
def test_tones_and_genders_are_of_one_family(left: str, right: str) -> None:
    assert family(left) == family(right)


def test_different_emoji_are_of_different_families() -> None:
    codes = ("1f44d", "1f44e", "1f48f", "1f491", "1f9d1-200d-2708-fe0f", "1f9d1-200d-1f680", "2640")
    assert len({family(code) for code in codes}) == len(codes)


def test_unicode_s_list_is_read() -> None:
    found = parse(LINES)
    assert found["2600-fe0f"] == Emoji("2600-fe0f", "sky & weather", "sun")
    assert [class_of(each) for each in found.values()] == ["happy face", "sky", "sky"]
    with pytest.raises(ValueError, match="expected 'code points"):
        parse("1F600 grinning face")
    with pytest.raises(ValueError, match="expected a class for the subgroup 'new'"):
        class_of(Emoji("1fae9", "new", "face"))


def test_names_of_files_are_brought_to_unicode_s_form() -> None:
    assert normal("a9-fe0f") == "00a9-fe0f"
    england = "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"
    assert normal("1f3f4-e0067_e0062_e0065_e006e_e0067") == england


def test_further_families_move_none() -> None:
    few = [f"{i:x}" for i in range(40)]
    sides = splits(few, ["a"] * 40)
    assert sides == splits(few, ["a"] * 40) and sides.count("tune") == sides.count("report") == 4
    with_other_class = splits([*few, "x1", "x2", "x3"], ["a"] * 40 + ["b"] * 3)
    assert with_other_class[:40] == sides and sorted(with_other_class[40:]) == [
        "report",
        "train",
        "tune",
    ]


def test_batches_hold_what_is_to_train_on_and_depend_on_seed_and_step_alone() -> None:
    first, second = (list(islice(EmojiData(32, seed=3).train_dataloader(), 4)) for _ in range(2))
    for (images, labels), (same, same_labels) in zip(first, second, strict=True):
        assert images.shape == (32, 3, 64, 64) and images.dtype == torch.uint8
        assert torch.equal(images, same) and torch.equal(labels, same_labels)
    training = {image.tobytes() for image in all_emoji().images[all_emoji().places("train")]}
    unmirrored = EmojiData(32, flip=False).train_dataloader()
    for images, _ in islice(unmirrored, 4):
        assert {image.numpy().tobytes() for image in images} <= training


def test_validation_shows_what_is_to_tune_with() -> None:
    shown = torch.cat([images for images, _ in EmojiData().val_dataloader()])
    assert torch.equal(shown, emoji("tune")[0])


def test_balance_makes_small_classes_more_frequent() -> None:
    labels = all_emoji().labels
    counts = [
        np.bincount(labels[EmojiData(balance=balance).training_images]) for balance in (0, 0.5, 1)
    ]
    worker, monster = (all_emoji().class_names.index(name) for name in ("worker", "monster"))
    assert counts[0][worker] == counts[1][worker] == counts[2][worker] == 408
    assert [each[monster] for each in counts] == [10, 60, 410]


def test_flags_clocks_signs_and_buttons_are_never_mirrored() -> None:
    data = EmojiData(64, balance=1.0)
    plain = {image.tobytes() for image in all_emoji().images}
    mirrored = {True: 0, False: 0}
    for images, labels in islice(data.train_dataloader(), 8):
        may = mirrorable(labels.numpy())
        for image, each in zip(images.numpy(), may.tolist(), strict=True):
            mirrored[each] += image.tobytes() not in plain
    assert mirrored[False] == 0 and mirrored[True] > 100


def test_written_folders_hold_every_image_and_the_mirror_images_that_are_right(
    tmp_path: Path,
) -> None:
    write_images(tmp_path, "tune")
    files = find_images(tmp_path)
    assert files.class_names == all_emoji().class_names
    images, labels = emoji("tune")
    assert len(files) == len(images) + mirrorable(labels.numpy()).sum()
    apple = all_emoji().places("tune")[0]
    name = f"{all_emoji().class_names[all_emoji().labels[apple]]}/{all_emoji().codes[apple]}"
    real = all_emoji().images[apple]
    assert np.array_equal(read_crop(tmp_path / f"{name}.png", 64), real)
    assert np.array_equal(read_crop(tmp_path / f"{name}-mirrored.png", 64), real[..., ::-1])


def test_a_model_of_another_size_is_refused(make_dit: MakeDiT) -> None:
    from sag_dit.checkpoints import from_denoiser
    from sag_dit.denoiser import ClassConditional
    from sag_dit.process import DDPM

    network = make_dit(input_size=32, in_channels=3, num_classes=31, learn_sigma=False)
    model = from_denoiser(ClassConditional(network, DDPM()), "small", codec=IdentityCodec())
    with pytest.raises(ValueError, match="64 x 64 in colour; set resolution=64"):
        EmojiData().check(model)
