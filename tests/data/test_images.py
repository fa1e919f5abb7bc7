"""Folders of images: which files count, batches as a function of (seed, step), bad images."""

from __future__ import annotations

import logging
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import IdentityCodec, VAECodec
from sag_dit.data import images
from sag_dit.data.crop import UnreadableImageError, read_crop
from sag_dit.data.images import Crops, ImageFolderData, find_images
from sag_dit.data.training_batches import Batch
from sag_dit.denoiser import ClassConditional
from sag_dit.evaluation.images import open_images
from sag_dit.process import DDPM
from tests.conftest import MakeDiT
from tests.data.making import image_folder, picture, same, save_vae, trainer, truncate


def steps(data: ImageFolderData, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(islice(data.train_dataloader(), count))


def test_files_and_labels_are_image_folders(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", ("b", "a", "c"))
    (root / "a" / "deep").mkdir()
    picture(20, 20).save(root / "a" / "deep" / "LOUD.PNG")
    (root / "a" / "notes.txt").write_text("no image")
    found, theirs = find_images(root), ImageFolder(str(root))
    assert sorted(zip(found.names, found.labels.tolist(), strict=True)) == sorted(
        (Path(path).relative_to(root).as_posix(), label) for path, label in theirs.samples
    )
    assert list(found.class_names) == theirs.classes
    assert found.labels.tolist() == sorted(found.labels.tolist())


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    image_folder(tmp_path, ("photos",))
    (tmp_path / "photos" / ".hidden").mkdir()
    picture(20, 20).save(tmp_path / "photos" / "._00.jpg", format="jpeg")
    found = find_images(tmp_path / "photos")
    assert found.class_names == ("photos",)
    assert found.names == ("00.jpg", "01.png", "02.png", "03.jpg")
    assert not found.labels.any()


def test_images_that_are_not_read_are_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for name in ("a.gif", "b.GIF", "c.JPE", "d.heic", "notes.txt", ".hidden.gif"):
        (root / "cats" / name).write_bytes(b"")
    (root / "dogs" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dogs" / "itself.png").symlink_to("itself.png")
    os.mkfifo(root / "dogs" / "pipe.png")
    (root / "dogs" / "linked.jpg").symlink_to(root / "dogs" / "01.png")
    found = find_images(root)
    assert len(found) == 9 and "dogs/linked.jpg" in found.names
    assert {why: sorted(names) for why, names in found.left_out.items()} == {
        ".gif is not read": ["cats/a.gif", "cats/b.GIF"],
        ".jpe is not read": ["cats/c.JPE"],
        ".heic is not read": ["cats/d.heic"],
        "broken link": ["dogs/gone.png", "dogs/itself.png"],
        "no file": ["dogs/pipe.png"],
    }
    # A folder of nothing else says so, and a training run needs none of them.
    for image in (root / "cats").glob("0*"):
        image.unlink()
    with pytest.raises(ValueError, match=r"cats; .* left out are 2 \(\.gif is not read\): cats/"):
        find_images(root)
    data = ImageFolderData(root / "dogs", 16, 4, workers=0)
    data.prepare_data()
    assert len(steps(data, 3)) == 3


def files_of(root: Path, *names: str) -> ImageFolderData:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 24).save(root / name)
    return ImageFolderData(root, 16, 1, workers=0)


def test_report_tells_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = image_folder(tmp_path / "photos", each=3)
    picture(12, 50).save(root / "dogs" / "small.png")
    Image.new("LA", (20, 20)).save(root / "dogs" / "clear.png")
    (root / "dogs" / "text.png").write_text("no image at all")
    (root / "dogs" / "a.gif").write_bytes(b"")
    data = ImageFolderData(root, 16, 2, workers=0, held_out=0.2, background="white")
    held_out = int(data.held_out_images.sum())
    assert data.report().splitlines() == [
        f"data: 9 images in 2 classes: {9 - held_out} to train on, {held_out} held out",
        "  classes  cats (3), dogs (6)",
        "  sizes    12 to 25 pixels wide, 20 to 50 high",
        "  left out 1 (.gif is not read): dogs/a.gif",
        "  left out 1 (cannot be decoded): dogs/text.png",
        "  note: 1 is transparent and laid over white: dogs/clear.png",
        "  note: 1 of 9 images is smaller than 16 pixels and is enlarged: "
        f"{root / 'dogs' / 'small.png'}",
    ]
    # What the report has told is not told again before the first step.
    caplog.clear()
    data.prepare_data()
    assert not caplog.records


def test_report_of_very_many_images_looks_at_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CHECKED_UP_FRONT", 6)
    monkeypatch.setattr(images, "LOOKED_AT", 3)
    data = files_of(
        tmp_path, *(f"class {number}/{place}.png" for number in range(7) for place in "ab")
    )
    assert data.report().splitlines()[1:-1] == [
        f"  classes  {', '.join(f'class {n} (2)' for n in range(5))}, ... of 2 images each",
        "  sizes    20 pixels wide, 24 high, of 3 of them",
    ]


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (
            [
                f"{part}/{name}/{place}.png"
                for part in ("train", "val")
                for name in "ab"
                for place in "01"
            ],
            r"class folders train, val hold the same folders \(a, b\); .*=/.*/train$",
        ),
        (
            ["test/0.png", *(f"{part}/{name}/0.png" for part in ("train", "val") for name in "ab")],
            r"class folders train, val hold the same folders \(a, b\); .*=/.*/train$",
        ),
        (["train/a/0.png", "train/b/0.png"], r"class folders train hold"),
        (["a/0.png", "a/1.png", "b/0.png"], "1 class has a single image: b"),
        (["cat_0.png", "cat_1.png", "dog_0.png", "dog_1.png"], "as if of 2: cat, dog; if so"),
        (["cat (1).png", "cat (2).png", "dog (10).png", "dog (2).png"], "as if of 2: cat, dog"),
        (["n01440764_1.png", "n01440764_9.png", "n0152_1.png", "n0152_2.png"], "n01440764"),
    ],
)
def test_report_warns_of_what_looks_like_other_classes(
    names: list[str], warning: str, tmp_path: Path
) -> None:
    lines = files_of(tmp_path / "photos", *names).report().splitlines()
    assert [line for line in lines if re.search(f"  warning: .*{warning}", line)], lines


@pytest.mark.parametrize(
    "names",
    [
        [f"{name}/images/{place}.png" for name in "ab" for place in "01"],  # Tiny ImageNet's
        ["IMG_0001.png", "IMG_0002.png"],
        ["a/cat_0.png", "a/dog_0.png", "b/cat_1.png", "b/dog_1.png"],
        ["sunset.png", "beach 2.png", "tree.png"],
        ["one1.png", "two2.png", "three3.png"],
    ],
)
def test_report_does_not_warn_of_what_is_usual(names: list[str], tmp_path: Path) -> None:
    assert "warning" not in files_of(tmp_path, *names).report()


def test_links_that_lead_back_are_left_out_by_name(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("a", "b"))
    count = len(find_images(root))
    # Each of the links to the root holds all of them again, two of them 2^40 times.
    for link, target in (("a/self", "."), ("a/up", ".."), ("b/root", root)):
        (root / link).symlink_to(target)
    (root / "b" / "elsewhere").symlink_to(root / "a")
    found = find_images(root)
    assert len(found) == count + sum(name.startswith("a/") for name in found.names)
    left = found.left_out["link to a folder that it lies in"]
    assert {"a/self/", "a/up/", "b/root/"} <= set(left)


def test_names_that_are_no_utf8_are_told_in_what_can_be_printed(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("a", "b"))
    odd = root / "a" / "caf\udce9\x1b[31m.png"
    Image.new("RGBA", (20, 20)).save(odd)
    data = ImageFolderData(root, 16, 1, workers=0, background="white")
    report = data.report()
    assert r"laid over white: a/caf\udce9\x1b[31m.png" in report
    assert report.encode()  # as printing does
    assert data.fingerprint()["images"] == len(data.files)
    assert open_images(root, size=16).digest()
    # A run could not hold it as the name of a class.
    odd.parent.rename(root / "caf\udce9")
    with pytest.raises(ValueError, match=r"class folder b'caf\\xe9' has a name that is not UTF-8"):
        find_images(root)


@pytest.mark.parametrize("background", ["white", None])
def test_transparent_images_are_read_over_the_background_and_told_of(
    background: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path, ("a",))
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(root / "a" / "clear.png")
    data = ImageFolderData(root, 16, 5, flip=False, workers=0, background=background)
    data.prepare_data()
    (images, _) = steps(data, 1)[0]
    colours = images.permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0).tolist()
    assert ([255, 255, 255] in colours, [255, 0, 0] in colours) == (
        (True, False) if background else (False, True)
    )
    how = "laid over white" if background else "hidden colours show"
    assert f"1 is transparent and {how}" in caplog.text.replace(
        "read as before there was data.background: ", ""
    )
    with pytest.raises(ValueError, match="background=see-through: expected the name of a colour"):
        ImageFolderData(root, 16, 4, background="see-through")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text(""), "is a file"),
        (lambda root: root.mkdir(), "no image found"),
        (lambda root: (root / "cats").mkdir(parents=True), "no image found"),
        (lambda root: (image_folder(root) / "mice").mkdir(), "no image in 1 of 3 .* mice"),
        (
            lambda root: picture(9, 9).save(image_folder(root) / "a.png"),
            "a.png lies beside the folders cats, dogs; expected",
        ),
    ],
    ids=["missing", "file", "empty", "empty folders", "class without image", "mixed"],
)
def test_unusable_folders_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "photos")
    with pytest.raises(ValueError, match=message):
        ImageFolderData(tmp_path / "photos", size=16)


def test_batches_do_not_depend_on_workers_or_resumption(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    alone = steps(ImageFolderData(root, 16, 3, seed=5, workers=0), 6)
    assert same(alone, steps(ImageFolderData(root, 16, 3, seed=5, workers=2), 6))
    resumed = ImageFolderData(root, 16, 3, seed=5, workers=0)
    resumed.trainer = trainer(total_batch_idx=3)
    assert same(alone[4:], steps(resumed, 2))
    assert not same(alone, steps(ImageFolderData(root, 16, 3, seed=6, workers=0), 6))


def test_ranks_share_the_batch_of_one(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    alone = steps(ImageFolderData(root, 16, 4, workers=0), 5)
    parts = []
    for rank in range(2):
        data = ImageFolderData(root, 16, 4, workers=0)
        data.trainer = trainer(rank, 2)
        parts.append(steps(data, 5))
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        for both in zip(*parts, strict=True)
    ]
    assert same(alone, joined)
    assert [len(labels) for _, labels in parts[0]] == [2] * 5


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    plain = steps(ImageFolderData(root, 16, 8, flip=False, workers=0), 12)
    mirrored = 0
    for (before, labels), (after, same_labels) in zip(
        plain, steps(ImageFolderData(root, 16, 8, workers=0), 12), strict=True
    ):
        assert torch.equal(labels, same_labels)
        for image, other in zip(before, after, strict=True):
            flipped = torch.equal(image.flip(-1), other)
            assert flipped != torch.equal(image, other)
            mirrored += flipped
    assert 30 < mirrored < 66  # of 96
    everything = torch.cat([images for images, _ in plain[:1]])
    crops = Crops(find_images(root), 16)
    assert {image.numpy().tobytes() for image in everything} == {
        crops[i][0].numpy().tobytes() for i in range(8)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_give_way_to_the_next(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path, each=4)
    broken = truncate(root / "cats" / "02.png")
    (root / "cats" / "04.png").write_text("no image at all")
    data = ImageFolderData(root, 16, 8, flip=False, workers=workers)
    assert data.files.names[1:4] == ("cats/02.png", "cats/04.png", "cats/06.jpg")
    (images, labels), again = steps(data, 2)[0], steps(data, 1)[0]
    assert torch.equal(images, again[0])
    crops = data.dataset
    after = torch.from_numpy(read_crop(root / "cats" / "06.jpg", 16))
    assert sum(torch.equal(image, after) for image in images) == 3
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4
    assert crops.skipped == ["cats/02.png", "cats/04.png"]
    if not workers:
        assert sum(str(broken) in record.message for record in caplog.records) == 1
    data.teardown("fit")
    assert "2 of 8 images were left out" in caplog.text


def test_last_image_gives_way_to_the_first_of_its_group(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("a",), each=4)
    truncate(root / "a" / "03.jpg")
    crops = Crops(find_images(root), 16, groups=np.array([True, False, True, False]))
    images, _ = crops.__getitems__(Batch(0, [3, 1], [False, False]))
    assert torch.equal(images[0], images[1])
    truncate(root / "a" / "01.png")
    with pytest.raises(ValueError, match="no image can be decoded"):
        Crops(crops.files, 16, groups=crops._groups).__getitems__(Batch(0, [3], [False]))


def test_strict_makes_an_error_of_a_corrupt_image(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    truncate(root / "dogs" / "05.png")
    with pytest.raises(UnreadableImageError, match=r"05\.png cannot be decoded .*strict=false"):
        steps(ImageFolderData(root, 16, 8, strict=True, workers=0), 1)


def test_a_file_that_cannot_be_read_is_not_called_corrupt(tmp_path: Path) -> None:
    data = ImageFolderData(image_folder(tmp_path), 16, 8, workers=0)
    (tmp_path / "dogs" / "05.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"05\.png"):
        steps(data, 1)
    assert data.dataset.skipped == []


def test_images_are_looked_at_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path, side=20)
    data = ImageFolderData(root, 24, 8)
    data.prepare_data()
    assert "8 of 8 images are smaller than 24 pixels and are enlarged" in caplog.text
    (root / "cats" / "00.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        data.prepare_data()
    assert data.dataset.skipped == ["cats/00.jpg"]
    with pytest.raises(UnreadableImageError, match=r"00\.jpg"):
        ImageFolderData(root, 24, 8, strict=True).prepare_data()
    (root / "cats" / "00.jpg").unlink()
    with pytest.raises(ValueError, match=r"02\.png has 22 x 22 pixels: expected 24 or more"):
        ImageFolderData(root, 24, 8, strict=True).prepare_data()
    caplog.clear()
    ImageFolderData(root, 16, 7).prepare_data()
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"held_out": 1.0}, "held_out=1.0: expected a share"),
        ({"workers": -1}, "workers=-1: expected 0 or more"),
        ({"size": 0}, "size=0: expected 1 or more"),
        ({"channels": 4}, "channels=4: expected 3 .colour. or 1"),
    ],
)
def test_values_out_of_range_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolderData(image_folder(tmp_path), **{"size": 16, "batch_size": 4, **options})


def test_batch_must_suit_ranks_and_images(tmp_path: Path) -> None:
    data = ImageFolderData(image_folder(tmp_path), 16, 5)
    data.trainer = trainer(world=2)
    with pytest.raises(ValueError, match="batch_size=5 on 2 ranks: expected a multiple of 2"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="batch_size=9: expected from 1 to 8, the number"):
        ImageFolderData(tmp_path, 16, 9).train_dataloader()


def test_data_is_checked_against_the_model(tmp_path: Path, make_dit: MakeDiT) -> None:
    root = image_folder(tmp_path / "photos")

    def check(size: int, channels: int, *, latent: bool, **options: Any) -> None:
        codec = VAECodec(save_vae(tmp_path / "vae")) if latent else IdentityCodec()
        denoiser = ClassConditional(make_dit(**options), DDPM())
        model = from_denoiser(denoiser, "tiny", codec=codec)
        ImageFolderData(root, size, 8, channels=channels).check(model)

    check(16, 3, latent=True, num_classes=2)
    check(8, 3, latent=False, in_channels=3, num_classes=2)
    with pytest.raises(ValueError, match=r"size=18: expected a multiple of 4"):
        check(18, 3, latent=True, num_classes=2)
    with pytest.raises(ValueError, match=r"data\.size=32: expected 16, the resolution"):
        check(32, 3, latent=True, num_classes=2)
    with pytest.raises(ValueError, match=r"data\.channels=3: expected 1"):
        check(8, 3, latent=False, in_channels=1, num_classes=2)
    with pytest.raises(ValueError, match="the data has 2 classes and the model 10"):
        check(16, 3, latent=True)


@pytest.mark.parametrize("ending", ["tiff", "webp", "png"])
def test_of_several_pages_the_first_is_read_and_told(ending: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second], lossless=True)
    first.save(tmp_path / "b.png")
    data = ImageFolderData(tmp_path, size=8, batch_size=2, workers=0)
    said = f"  note: 1 holds several pages or frames, of which the first is read: a.{ending}"
    assert said in data.remarks()
    image, _ = data.dataset[0]
    assert image[:, 4, 4].tolist() == [255, 0, 0]
    reference = open_images(tmp_path)
    reference.digest()
    assert said.removeprefix("  note: ") in reference.notes


def test_images_of_unusual_endings_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for ending in ("jif", "mpo", "j2k", "dds", "pfm", "icns", "qoi", "CR2"):
        (tmp_path / f"b.{ending}").touch()
    (tmp_path / "notes.txt").touch()
    left_out = find_images(tmp_path).left_out
    assert sum(map(len, left_out.values())) == 8
    assert left_out[".mpo is not read"] == ["b.mpo"]
