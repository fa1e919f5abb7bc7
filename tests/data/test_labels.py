"""Labels that cannot be meant are told with what has them, in every kind of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.codec import IdentityCodec
from sag_dit.data.images import ImageFolderData, find_images
from sag_dit.data.labels import numbered
from sag_dit.data.latents import LatentData
from sag_dit.data.map_data import MapData
from sag_dit.data.npy_latents import NpyLatents
from sag_dit.data.training_batches import Batch, StepData
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from tests.data.making import image_folder, latent_folder
from tests.data.test_npy_latents import SHAPE, arrays
from tests.data.test_sources import contents, write_tar, write_zip

GREY = torch.zeros(1, 4, 4, dtype=torch.uint8)


class Told(torch.utils.data.Dataset[Any]):
    """Images that are all alike, of labels that are told beside them."""

    def __init__(self, items: Any, labels: Any = None, class_names: Any = None) -> None:
        self.items, self.labels, self.class_names = items, labels, class_names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return GREY, self.items[index]


def model_of(classes: int, channels: int = 1) -> Model:
    network = DiT(4, 2, channels, hidden_size=16, depth=1, num_heads=2, num_classes=classes)
    return from_denoiser(ClassConditional(network, DDPM()), "tiny")


def test_labels_that_are_not_those_of_the_items_are_refused_at_the_start() -> None:
    right = [place % 3 for place in range(40)]
    assert MapData(Told(right, right), 4, workers=0).labels.tolist() == right
    for shifted in (right[1:] + right[:1], torch.tensor(right[::-1])):
        with pytest.raises(
            ValueError, match=r"Told: item \d+ has label \d, and its labels say \d: "
        ):
            MapData(Told(right, shifted), 4, workers=0)
    last = [*right[:-1], 2]
    with pytest.raises(
        ValueError, match=r"item 39 has label 0, and its labels say 2: .*or leave it"
    ):
        MapData(Told(right, last), 4, workers=0)


def collated(items: list[Any]) -> Any:
    return torch.stack([image for image, _ in items]), torch.tensor([each for _, each in items])


@pytest.mark.parametrize("collate", [None, collated])
def test_other_labels_are_refused_when_training_reads_their_item(collate: Any) -> None:
    right = [place % 3 for place in range(40)]
    data = MapData(Told([*right[:5], 2, 2, *right[7:]], right), 4, workers=0, collate=collate)
    data.dataset.__getitems__(Batch(0, [4, 7], [False] * 2))
    with pytest.raises(ValueError, match="item 6 has label 2, and its labels say 0"):
        data.dataset.__getitems__(Batch(0, [4, 6], [False] * 2))
    # Those to validate with are compared too.
    second = Told(right, [*right[:-1], 1])
    with pytest.raises(ValueError, match="item 39 has label 0, and its labels say 1"):
        MapData(Told(right), 4, workers=0, validation=second, collate=collate)


def test_a_class_may_be_drawn_at_random_where_no_labels_are_told() -> None:
    class Several(Told):
        def __getitem__(self, index: int) -> Any:
            return GREY, int(torch.randint(3, ()))

    data = MapData(Several([0] * 40, class_names=("a", "b", "c")), 4, workers=0)
    labels = torch.cat(
        [data.dataset.__getitems__(Batch(s, [1, 2], [False] * 2))[1] for s in (1, 2)]
    )
    assert labels.max() < 3


@pytest.mark.parametrize(
    ("items", "labels", "names", "told"),
    [
        ([0, 1, 5], None, ["a", "b"], "has 2 class names: .*; item 2 is of class 5"),
        ([0, 1, 5], [0, 1, 5], ["a", "b"], "has 2 class names: .*; item 2 is of class 5"),
        ([0, 1, -2], None, None, "item 2 is of label -2: expected 0 or more"),
        ([0, 1, 1], [0, -1, 1], None, "its labels say -1 for item 1: expected a whole number"),
        ([0, 1, 1], [0, 1.5, 1], None, "its labels say 0.0 for item 0: expected a whole number"),
        ([0, 1, 1], [0, None, 1], None, "its labels say None for item 1: expected a whole"),
        ([0, 1, 1], [0, [1, 1], 1], None, "its labels are a list: expected 3 whole numbers"),
        ([0, 1, 1], ["a", "b", "a"], None, "its labels say 'a' for item 0: expected a whole"),
        ([0, 1, 1], [True] * 3, None, "its labels say True for item 0: expected a whole"),
        ([0, 1, 1], torch.eye(3), None, r"labels are float32 \(3, 3\): expected 3 whole"),
        ([0, 1, 1], [0, 1], None, r"its labels are int64 \(2,\): expected 3 whole numbers"),
        ([0, "cat", 1], None, None, "item 1 is of label 'cat': expected"),
        ([0, torch.eye(9), 1], None, None, r"item 1 is of label tensor\(\[\[1"),
        ([0, 1, 1], None, {"a": 0, "b": 1}, "class names are a dict: expected a list of names"),
        ([0, 1, 1], None, "ab", "class names are a str: expected a list of names"),
        ([0, 1, 1], None, 2, "class names are a int: expected a list of names"),
        ([0, 1, 1], None, ["a", "a"], "two of its classes are called 'a'"),
    ],
)
def test_labels_of_a_data_set_are_told_by_item(
    items: Any, labels: Any, names: Any, told: str
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        MapData(Told(items, labels, names), 2, workers=0)
    assert "\n" not in str(caught.value)


def test_class_names_may_be_an_array() -> None:
    assert MapData(Told([0, 1], None, np.array(["a", "b"])), 2).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.new("RGBA", (2, 2), (9, 9, 9, 0)), [255] * 3),
        (Image.new("LA", (2, 2), (9, 0)), [255]),
        (Image.new("P", (2, 2)), [0] * 3),
        (Image.new("I;16", (2, 2), 257 * 7), [7]),
        (Image.new("F", (2, 2), 0.2), [51]),
        (torch.full((1, 2, 2), 7, dtype=torch.uint8), [7]),
        (torch.full((1, 2, 2), 0.5, dtype=torch.float64, requires_grad=True), [0.5]),
    ],
    ids=["RGBA", "LA", "P", "I;16", "F", "uint8", "float64"],
)
def test_images_of_every_kind_are_read_as_files_are(image: Any, found: list[float]) -> None:
    images, _ = MapData([(image, 0)], 1, workers=0).dataset.__getitems__(Batch(0, [0], [False]))
    assert images[0, :, 0, 0].tolist() == found
    assert images.dtype in (torch.uint8, torch.float32) and not images.requires_grad


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.new("F", (2, 2), 300.0), "item 0 holds values from 300 to 300: expected 0 to 1"),
        (torch.full((1, 2, 2), float("nan")), "item 0 holds NaN or infinite values: expected fi"),
    ],
)
def test_values_that_mean_no_image_are_told(image: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MapData([(image, 0)], 1, workers=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_which_no_picture_can_be_drawn_are_refused(
    channels: int, dtype: torch.dtype
) -> None:
    data = MapData([(torch.zeros(channels, 4, 4, dtype=dtype), 0)], 1, workers=0)
    network = DiT(4, 2, channels, hidden_size=16, depth=1, num_heads=2, num_classes=1)
    model = from_denoiser(ClassConditional(network, DDPM()), "tiny", codec=IdentityCodec())
    with pytest.raises(ValueError, match=f"has images of {channels} channels: expected 1 .grey."):
        data.check(model)


def test_a_length_that_fails_is_told() -> None:
    class Endless(Told):
        def __len__(self) -> Any:
            return 2.5

    with pytest.raises(ValueError, match=r"Endless: its length fails with TypeError: 'float' obj"):
        MapData(Endless([0]), 1, workers=0)


def test_a_class_that_only_a_second_data_set_has_is_told() -> None:
    second = Told([0, 1, 4])
    with pytest.raises(ValueError, match="item 2 is of class 4, and the data has 2 classes"):
        MapData(Told([0, 1]), 2, workers=0, validation=second)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.rand(2), r"labels torch.float32 \(2,\): expected a whole number for each"),
        (torch.eye(2, dtype=torch.int64), r"labels torch.int64 \(2, 2\): expected a whole number"),
        (torch.tensor([1, 9]), "image 1 of a batch is of class 9, and the data has 2 classes: exp"),
    ],
)
def test_labels_that_a_collate_fn_makes_are_told(labels: torch.Tensor, told: str) -> None:
    class Collate:
        def __call__(self, items: Any) -> Any:
            images = torch.stack([image for image, _ in items])
            return images, labels if len(items) == 2 else torch.zeros(len(items)).long()

    with pytest.raises(ValueError, match=told):
        MapData(Told([0, 1]), 2, workers=0, collate=Collate())


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_data_of_ones_own_are_told_by_batch(workers: int) -> None:
    class Strange(torch.utils.data.Dataset[Any]):
        def __getitems__(self, batch: Batch) -> Any:
            wanted = [7 if index == 5 else index % 2 for index in batch.indices]
            return torch.stack([GREY] * len(wanted)), torch.tensor(wanted)

    class Own(StepData):
        class_names, channels = ("a", "b"), 1

        @property
        def dataset(self) -> Any:
            return Strange()

        @property
        def held_out_images(self) -> Any:
            return np.arange(8) >= 4

    own = Own(batch_size=4, seed=0, flip=False, workers=workers)
    assert own.report().startswith("data: 8 images in 2 classes: 4 to train on, 4 held out")
    assert next(iter(own.train_dataloader()))[1].sum() == 2
    with pytest.raises(ValueError, match="Own: image 1 of a batch is of class 7, and the data has"):
        list(own.val_dataloader())


def test_what_is_beyond_the_model_is_told_by_an_image_of_it(tmp_path: Path) -> None:
    told = "the data has 3 classes and the model 2: .* num_classes to 3; item 2 is of class 2$"
    with pytest.raises(ValueError, match=told):
        MapData(Told([0, 1, 2]), 2, workers=0).check(model_of(2))
    photos = image_folder(tmp_path, ("cats", "dogs", "mice"))
    data = ImageFolderData(photos, 4, 2, channels=1, workers=0)
    with pytest.raises(ValueError, match=r"the model 2: .*; .*/mice/02\.png is of class 2$"):
        data.check(model_of(2))
    with pytest.raises(ValueError, match=r"the data has 3 classes and the model 5: [^;]*; [^;]*$"):
        data.check(model_of(5))


def in_csv(label: object) -> Callable[[Path], Any]:
    def make(at: Path) -> Any:
        photos = image_folder(at / "photos", ("cats", "dogs"))
        rows = [f"{name},{int(name[0] == 'd')}\n" for name in contents(photos)]
        (at / "labels.csv").write_text("".join([*rows[:-1], f"{rows[-1].split(',')[0]},{label}"]))
        return find_images(photos, str(at / "labels.csv"), ["cat", "dog"])

    return make


def in_json(label: object) -> Callable[[Path], Any]:
    def make(at: Path) -> Any:
        files = contents(image_folder(at / "photos", ("cats", "dogs")))
        labels = [[name, int(name[0] == "d")] for name in files]
        labels[-1][1] = label  # type: ignore[call-overload]
        table = json.dumps({"labels": labels}).encode()
        archive = write_zip(at / "photos.zip", {**files, "dataset.json": table})
        return find_images(archive, None, ["cat", "dog"])

    return make


def in_shards(label: object, ending: str = "cls") -> Callable[[Path], Any]:
    def make(at: Path) -> Any:
        files = contents(image_folder(at / "photos", ("cats", "dogs")))
        renamed = {name.replace("/", "-"): content for name, content in files.items()}
        labels = {name.split(".")[0]: int(name[0] == "d") for name in renamed}
        labels[[*labels][-1]] = label  # type: ignore[assignment]
        told = {
            f"{name}.{ending}": (
                f"{each}" if ending == "cls" else json.dumps({"label": each})
            ).encode()
            for name, each in labels.items()
        }
        archive = write_tar(at / "a.tar", {**renamed, **told})
        return find_images(archive, "label" if ending == "json" else None, ["cat", "dog"])

    return make


def in_npy(label: object) -> Callable[[Path], Any]:
    def make(at: Path) -> Any:
        names = [f"img{place}-dogs.npy" for place in range(5)]
        for name, array in zip(names, arrays(SHAPE), strict=True):
            np.save(at / name, array)
        labels = [[name, place % 2] for place, name in enumerate(names)]
        labels[-1][1] = label  # type: ignore[call-overload]
        (at / "dataset.json").write_text(json.dumps({"labels": labels}))
        return NpyLatents(at)

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            in_csv(-1),
            r"labels\.csv: dogs/.* is of class -1: expected a whole number, 0 or more, or",
        ),
        (in_csv(1.5), r"labels\.csv: dogs/.* is of class 1.5: expected a whole number"),
        (in_csv("nan"), r"labels\.csv: dogs/.* is of class nan: expected a whole number"),
        (in_csv(7), r"2 names, and in .*labels\.csv dogs/.* is of class 7: expected 0 to 1"),
        (in_csv("bird"), r"'bird' is not among them, .*labels\.csv has, for dogs/.* all 2 classes"),
        (in_json(-1), r"dataset\.json: dogs/.* is of class -1: expected 0 to 1$"),
        (in_json(1.5), r"label \d is \['dogs/.*', 1.5\]; expected"),
        (in_json(7), r"2 names, and in dataset\.json dogs/.* is of class 7: expected 0 to 1"),
        (in_json("x"), r"dataset\.json: classes are numbers, and 'x', that of dogs/"),
        (in_shards(-1), r"the \.cls of each image: dogs.* is of class -1: expected a whole number"),
        (in_shards(1.5), r"the \.cls of each image: dogs.* is of class 1.5: expected a whole"),
        (in_shards(7), r"in the \.cls of each image dogs.* is of class 7: expected 0 to 1"),
        (in_shards(""), r"the \.cls of each image: dogs.* has no class: expected its class"),
        (in_shards(-1, "json"), r"label in the \.json of each image: dogs.* is of class -1: exp"),
        (in_shards(1.5, "json"), r"dogs.*\.json has 1.5 there: expected a class, its number"),
        (in_shards(7, "json"), r"label in the \.json of each image dogs.* is of class 7: expected"),
        (in_npy(-1), r"img4-dogs\.npy is of class -1: expected 0 to"),
        (in_npy(1.5), r"dataset\.json: label 4 is \['img4-dogs\.npy', 1.5\]"),
        (in_npy("x"), r"classes are numbers, and 'x', that of img4-dogs\.npy"),
    ],
)
def test_labels_of_files_are_told_by_image(
    make: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_beside_numbers_stay_names(tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", ("cats", "dogs"), each=1)
    (tmp_path / "labels.csv").write_text("cats/00.jpg,7up\ndogs/01.png,7\n")
    assert find_images(photos, str(tmp_path / "labels.csv")).class_names == ("7", "7up")


def test_rows_are_told_by_their_numbers() -> None:
    """As a data set of Hugging Face marks what has no label."""
    with pytest.raises(ValueError, match="its column: 00000002 is of class -1: expected 0 to 1"):
        numbered([0, 1, -1], ["00000000", "00000001", "00000002"], ["a", "b"], "its column")


def test_a_report_adds_up(tmp_path: Path) -> None:
    items = [0] * 30 + [1] * 10
    data = MapData(Told(items), 4, workers=0, held_out=0.2, balance=1.0)
    held_out = int(data.held_out_images.sum())
    lines = data.report().splitlines()
    first = f"data: 40 images in 2 classes: {40 - held_out} to train on, {held_out} held out"
    assert lines[0] == first and 0 < held_out < 40
    assert lines[1].startswith(f"  epoch    {len(data.training_images)} images, those of small")
    assert "  classes  0 (30), 1 (10)" in lines
    assert "  sizes    4 x 4 pixels in 1 channel, of Told" in lines
    second = MapData(Told(items), 4, workers=0, validation=Told([0]))
    assert second.report().startswith(
        "data: 40 images in 2 classes, and 1 other to validate with\n"
    )
    alone = MapData(Told([0]), 1, workers=0).report()
    assert alone.startswith("data: 1 image in 1 class\n")
    assert "warning: 1 class has a single image: 0" in alone
    root = latent_folder(tmp_path / "latents")
    latents = LatentData(root, 4, validation=root)
    assert latents.report().startswith("data: 12 images in 2 classes, and 12 others to validate w")
