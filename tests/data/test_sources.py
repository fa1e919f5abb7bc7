"""Archives, shards, label files and data sets on disk: the same images as in class folders."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sag_dit.data import archives
from sag_dit.data.archives import Archives, list_members
from sag_dit.data.images import Crops, ImageFolderData, find_images
from sag_dit.evaluation.images import open_images
from tests.data.making import image_folder, same, trainer

CLASSES = ("cats", "dogs", "mice")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "photos", CLASSES, each=4)


def contents(photos: Path) -> Files:
    """The files of a folder, in no order of theirs."""
    files = sorted(
        (file for file in photos.rglob("*") if file.is_file()), key=lambda f: f.stem[::-1]
    )
    return {file.relative_to(photos).as_posix(): file.read_bytes() for file in files}


def write_zip(file: Path, files: Files, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file


def write_tar(file: Path, files: Files, mode: Any = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def moved(files: Files) -> tuple[Files, dict[str, int]]:
    """The same images without class folders, and the number of each one's class."""
    renamed = {name: f"00000/{name.replace('/', '-')}" for name in files}
    labels = {renamed[name]: CLASSES.index(name.split("/")[0]) for name in files}
    return {renamed[name]: content for name, content in files.items()}, labels


def of_zip(photos: Path, to: Path) -> dict[str, Any]:
    return {"root": write_zip(to / "photos.zip", contents(photos))}


def of_deflated_zip(photos: Path, to: Path) -> dict[str, Any]:
    within = {f"photos/{name}": content for name, content in contents(photos).items()}
    return {"root": write_zip(to / "within.zip", within, zipfile.ZIP_DEFLATED)}


def of_tar(photos: Path, to: Path) -> dict[str, Any]:
    dotted = {f"./{name}": content for name, content in contents(photos).items()}
    return {"root": write_tar(to / "photos.tar", dotted)}


def of_edm2(photos: Path, to: Path) -> dict[str, Any]:
    files, labels = moved(contents(photos))
    table = json.dumps({"labels": [*map(list, labels.items())]}).encode()
    file = write_zip(to / "edm2.zip", {**files, "dataset.json": table})
    return {"root": file, "class_names": CLASSES}


def of_csv(photos: Path, to: Path) -> dict[str, Any]:
    files, labels = moved(contents(photos))
    for name, content in files.items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_bytes(content)
    with (to / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["split", "file_name", "label"])
        writer.writerows(["train", name, CLASSES[label]] for name, label in labels.items())
    return {"root": to, "labels": "labels.csv"}


def of_json(photos: Path, to: Path) -> dict[str, Any]:
    made = of_csv(photos, to)
    _, labels = moved(contents(photos))
    (to / "dataset.json").write_text(json.dumps({"labels": labels}))
    return {**made, "labels": "dataset.json", "class_names": CLASSES}


def of_shards(photos: Path, to: Path) -> dict[str, Any]:
    """WebDataset's layout; shards so filled that their order is that of the classes' images."""
    to.mkdir(exist_ok=True)
    shards: list[Files] = [{}, {}]
    for number, (name, content) in enumerate(sorted(contents(photos).items())):
        folder, _, file = name.partition("/")
        key, _, ending = file.partition(".")
        samples = shards[number % 4 // 2]
        samples[f"{folder}{key}.{ending}"] = content
        samples[f"{folder}{key}.cls"] = f"{CLASSES.index(folder)}\n".encode()
        samples[f"{folder}{key}.json"] = b"{}"
        samples[f"{folder}{key}.seg.png"] = b"a mask"
    for number, samples in enumerate(shards):
        write_tar(to / f"train-{number:03d}.tar", samples)
    return {"root": to, "class_names": CLASSES}


def of_described_shards(photos: Path, to: Path) -> dict[str, Any]:
    """As img2dataset and timm have it: the class is a key of each sample's .json."""
    made = of_shards(photos, to / "before")
    (to / "shards").mkdir()
    for number, shard in enumerate(sorted((to / "before").glob("*.tar"))):
        samples: Files = {}
        with tarfile.open(shard) as archive:
            for name in archive.getnames():
                stream = archive.extractfile(name)
                assert stream is not None
                content = stream.read()
                if name.endswith(".cls"):
                    told = {"caption": "a photo", "width": 20, "label": int(content)}
                    samples[name.replace(".cls", ".json")] = json.dumps(told).encode()
                elif not name.endswith(".json"):
                    samples[name] = content
        write_tar(to / "shards" / f"train-{number:03d}.tar", samples)
    return {**made, "root": to / "shards", "labels": "label"}


def of_hub(photos: Path, to: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    files = find_images(photos)
    features = datasets.Features(
        picture=datasets.Image(),
        label=datasets.ClassLabel(names=[*CLASSES]),
        id=datasets.Value("int32"),
    )
    rows = {
        "picture": [{"bytes": files.read(i), "path": None} for i in range(len(files))],
        "label": files.labels.tolist(),
        "id": list(range(len(files))),
    }
    # Built of Arrow's table, since from_dict hashes what not all of its versions can.
    table = datasets.table.InMemoryTable.from_pydict(rows, schema=features.arrow_schema)
    about = datasets.DatasetInfo(features=features)
    datasets.Dataset(table, about, fingerprint="of a test").save_to_disk(str(to / "hub"))
    return {"root": to / "hub"}


Source = Callable[[Path, Path], dict[str, Any]]
SOURCES: list[Source] = [
    *(of_zip, of_deflated_zip, of_tar, of_edm2, of_csv, of_json, of_shards),
    *(of_described_shards, of_hub),
]
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)


def data_of(made: dict[str, Any], **options: Any) -> ImageFolderData:
    return ImageFolderData(**{"size": 16, "batch_size": 4, "workers": 0, **made, **options})


def steps(data: ImageFolderData, count: int) -> list[Any]:
    return list(islice(data.train_dataloader(), count))


@each_source
def test_its_batches_are_those_of_class_folders(
    source: Source, photos: Path, tmp_path: Path
) -> None:
    made = source(photos, tmp_path)
    expected, data = data_of({"root": photos}), data_of(made)
    assert data.class_names == expected.class_names == CLASSES
    assert data.labels.tolist() == expected.labels.tolist()
    whole = steps(expected, 7)
    assert same(whole, steps(data, 7))
    # In other processes, from the middle on, and as two ranks.
    resumed = data_of(made, workers=2)
    resumed.trainer = trainer(total_batch_idx=2)
    assert same(whole[3:5], steps(resumed, 2))
    parts = []
    for rank in range(2):
        half = data_of(made)
        half.trainer = trainer(rank, 2)
        parts.append(steps(half, 3))
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        for both in zip(*parts, strict=True)
    ]
    assert same(whole[:3], joined)


@each_source
def test_its_held_out_images_fingerprint_and_report_hold(
    source: Source, photos: Path, tmp_path: Path
) -> None:
    made = source(photos, tmp_path)
    data = data_of(made, held_out=0.3)
    held_out, classes = data.held_out_images, {name: 4 for name in CLASSES}
    assert 0 < held_out.sum() < 9
    seen = {label for _, labels in data.val_dataloader() for label in labels.tolist()}
    assert seen == {*data.labels[held_out].tolist()}
    fingerprint = data.fingerprint()
    assert (fingerprint["images"], fingerprint["classes"]) == (12, classes)
    assert data_of(made).fingerprint() == fingerprint
    assert "12 images" in data_of(made).report() and "warning" not in data.report()
    reader = pickle.loads(pickle.dumps(data.dataset.files))
    assert [reader.read(i) for i in range(12)] == [data.files.read(i) for i in range(12)]


@pytest.mark.parametrize("source", [of_csv, of_edm2, of_shards], ids=lambda s: s.__name__)
def test_a_changed_label_changes_the_fingerprint(
    source: Source, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before = data_of(source(photos, tmp_path / "a")).fingerprint()
    monkeypatch.setattr(f"{__name__}.CLASSES", ("dogs", "cats", "mice"))
    made = {**source(photos, tmp_path / "b")}
    if "class_names" in made:
        made["class_names"] = ("cats", "dogs", "mice")
    else:
        made = {"root": tmp_path / "b", "labels": "labels.csv"}
        text = (tmp_path / "b" / "labels.csv").read_text()
        swapped = text.replace("-00.jpg,cats", "-00.jpg,mice").replace(
            "-02.png,mice", "-02.png,cats"
        )
        assert swapped != text
        (tmp_path / "b" / "labels.csv").write_text(swapped)
    after = data_of(made).fingerprint()
    assert before["classes"] == after["classes"] and before["sha256"] != after["sha256"]


@pytest.mark.parametrize("source", [of_zip, of_tar, of_shards], ids=lambda s: s.__name__)
def test_a_reference_reads_it(source: Source, photos: Path, tmp_path: Path) -> None:
    here, there = (
        open_images(photos, size=16),
        open_images(source(photos, tmp_path)["root"], size=16),
    )
    assert here.labels == there.labels
    assert same(list(here.read(5)), list(there.read(5)))


def test_shards_are_named_by_a_pattern(photos: Path, tmp_path: Path) -> None:
    of_shards(photos, tmp_path)
    assert len(open_images(tmp_path / "train-{000..001}.tar")) == 12
    write_tar(tmp_path / "val-000.tar", {"a.png": contents(photos)["dogs/01.png"], "a.cls": b"7"})
    train = find_images(tmp_path / "train-*.tar")
    assert len(train) == 12 and train.class_names == ("0", "1", "2")
    assert find_images(tmp_path / "train-{000..001}.tar").names == train.names
    assert len(find_images(tmp_path)) == 13
    with pytest.raises(ValueError, match=r"train-002\.tar cannot be read as tar \(No such file"):
        find_images(tmp_path / "train-{000..002}.tar")
    with pytest.raises(ValueError, match=r"data\.root=.*test-\*\.tar: does not exist; expected a"):
        find_images(tmp_path / "test-*.tar")


def test_samples_without_an_image_or_a_class_are_told(photos: Path, tmp_path: Path) -> None:
    image = contents(photos)["dogs/01.png"]
    samples = {"1.png": image, "1.cls": b"cat", "1.seg.png": image, "2.png": image, "3.cls": b"dog"}
    files = find_images(write_tar(tmp_path / "a.tar", samples))
    assert files.names == ("1.png",) and files.class_names == ("cat",)
    assert files.left_out == {
        "further image of its sample": ["1.seg.png"],
        "no .cls beside it": ["2.png"],
    }


@pytest.mark.parametrize(
    ("described", "labels", "told"),
    [
        ({"label": 1, "url": "x"}, "class", "has no such key: expected one of label, url"),
        ({"label": [1, 0]}, "label", r"has \[1, 0\] there: expected a class, its number or its"),
        ([1], "label", "has no such key: expected one of them"),
        (None, "label", "expected a readable JSON file"),
    ],
)
def test_a_description_that_has_no_class_is_told(
    described: Any, labels: str, told: str, photos: Path, tmp_path: Path
) -> None:
    content = b"{" if described is None else json.dumps(described).encode()
    image = contents(photos)["cats/00.jpg"]
    write_tar(tmp_path / "a.tar", {"0001.jpg": image, "0001.json": content})
    with pytest.raises(ValueError, match=told) as caught:
        find_images(tmp_path, labels)
    assert "0001.json" in str(caught.value) and "\n" not in str(caught.value)


def test_names_in_descriptions_are_classes_and_none_is_told_of(
    photos: Path, tmp_path: Path
) -> None:
    images = contents(photos)
    files: Files = {"0003.png": images["mice/02.png"]}
    for number, name in enumerate(("cats/00.jpg", "dogs/01.png")):
        files[f"{number:04d}.{name[-3:]}"] = images[name]
        files[f"{number:04d}.json"] = json.dumps({"class": name[:4]}).encode()
    file = write_tar(tmp_path / "a.tar", files)
    found = find_images(file, "class")
    assert found.class_names == ("cats", "dogs") and len(found) == 2
    assert found.left_out == {"no .json beside it": ["0003.png"]}
    assert found.labels_from == "class in the .json of each image"
    told = ImageFolderData(file, 8, 1).report()
    assert "a .json lies beside each image and is not read; data.labels=KEY takes" in told
    with pytest.raises(ValueError, match=r"or a key of the .json beside each image"):
        find_images(file, "labels.csv")


def test_an_archive_without_labels_is_one_class(photos: Path, tmp_path: Path) -> None:
    files, _ = moved(contents(photos))
    unlabelled = find_images(
        write_zip(tmp_path / "faces.zip", {**files, "dataset.json": b'{"labels": null}'})
    )
    assert len(unlabelled) == 12 and unlabelled.class_names == ("faces",)
    flat = {name.rpartition("/")[2]: content for name, content in files.items()}
    assert find_images(write_tar(tmp_path / "flat.tar", flat)).class_names == ("flat",)


HOSTILE = ("../out.png", "/etc/out.png", "cats/../../out.png", "C:\\out.png", "..\\out.png")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_hostile_names_are_left_out_and_nothing_is_written(
    write: Any, photos: Path, tmp_path: Path
) -> None:
    files = contents(photos)
    (tmp_path / "here").mkdir()
    hostile = {name: files["cats/00.jpg"] for name in HOSTILE}
    more = {"cats/.hidden.png": b"", "__MACOSX/._a.png": b"", "cats/a.gif": b"", "cats/a.npy": b""}
    root = write(
        tmp_path / "here" / f"bad{write is write_zip}.{write.__name__[-3:]}",
        {**files, **hostile, **more},
    )
    before = sorted(tmp_path.rglob("*"))
    data = data_of({"root": root})
    list(islice(data.train_dataloader(), 4))
    assert len(data.files) == 12 and data.class_names == CLASSES
    left_out = data.files.left_out
    outside = left_out["name that leads out of the archive"]
    assert len(outside) == (5 if write is write_zip else 4)
    assert left_out[".gif is not read"] == ["cats/a.gif"]
    assert left_out[".npy is not read"] == ["cats/a.npy"]
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_tar_are_left_out(photos: Path, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", contents(photos))
    with tarfile.open(file, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            entry = tarfile.TarInfo(f"cats/{name}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        pipe = tarfile.TarInfo("cats/pipe.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    assert find_images(file).left_out == {
        "link": ["cats/hard.png", "cats/soft.png"],
        "no plain file": ["cats/pipe.png"],
    }


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 + 100])


def overwritten_header(file: Path) -> None:
    """Damage the header of a member in the middle, which Python takes for the end."""
    with tarfile.open(file) as archive:
        offset = archive.getmembers()[5].offset
    content = bytearray(file.read_bytes())
    content[offset : offset + 300] = b"\x07" * 300
    file.write_bytes(content)


def twice(file: Path) -> None:
    with tarfile.open(file, "a") as archive:
        archive.addfile(tarfile.TarInfo("cats/00.jpg"))


@pytest.mark.parametrize(
    ("write", "damage", "told"),
    [
        (
            write_zip,
            cut,
            r"a\.zip cannot be read as zip .*: expected an undamaged archive; copy",
        ),
        (write_zip, lambda f: f.write_bytes(b""), r"a\.zip cannot be read as zip .*; copy or down"),
        (write_tar, cut, r"a\.tar cannot be read as tar \(unexpected end of data\): .*; copy or"),
        (write_tar, overwritten_header, r"a\.tar cannot be read as tar \(no header at byte \d+\)"),
        (write_tar, lambda f: f.write_bytes(b"x" * 999), r"a\.tar cannot be read as tar"),
        (write_tar, lambda f: f.unlink(), "does not exist"),
        (write_tar, twice, r"a\.tar holds 'cats/00\.jpg' twice: expected each name once"),
    ],
)
def test_a_damaged_archive_is_told_in_a_sentence(
    write: Any, damage: Callable[[Path], Any], told: str, photos: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / f"a.{write.__name__[-3:]}", contents(photos))
    # Also where an undamaged one was listed before.
    assert len(find_images(file)) == 12
    damage(file)
    with pytest.raises(ValueError, match=told) as caught:
        find_images(file)
    assert "\n" not in str(caught.value)


def test_a_compressed_tar_is_refused(photos: Path, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar.gz", contents(photos), "w:gz")
    with pytest.raises(ValueError, match=r"a compressed tar, .*unpack it, or repack it with tar"):
        find_images(file)
    write_tar(tmp_path / "b.tar", contents(photos), "w:gz")
    with pytest.raises(ValueError, match=r"b\.tar cannot be read as tar"):
        find_images(tmp_path / "b.tar")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_gives_way_to_the_next(
    method: int, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_zip(tmp_path / "a.zip", contents(photos), method)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("dogs/01.png")
    content = bytearray(file.read_bytes())
    middle = info.header_offset + 60 + info.compress_size // 2
    content[middle : middle + 20] = bytes(20)
    file.write_bytes(content)
    data = data_of({"root": file}, flip=False)
    place = data.files.names.index("dogs/01.png")
    assert data.dataset.read(place) is None
    assert "a.zip/dogs/01.png is damaged" in caplog.text
    np.testing.assert_array_equal(data.dataset[place][0], data.dataset[place + 1][0])
    with pytest.raises(ValueError, match=r"a\.zip/dogs/01\.png is damaged.*strict=false"):
        Crops(data.files, 16, strict=True).read(place)
    reference = open_images(file, size=16)
    with pytest.raises(ValueError, match=r"dogs/01\.png is damaged.*remove it"):
        list(reference.read(12))


def test_an_archive_that_shrinks_while_it_is_read_ends_training(
    photos: Path, tmp_path: Path
) -> None:
    file = write_tar(tmp_path / "a.tar", contents(photos))
    data = data_of({"root": file})
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(OSError, match=r"a\.tar is cut short; copy or download it again"):
        [data.dataset.read(i) for i in range(12)]


def test_a_member_that_unpacks_to_more_than_it_says_is_damaged(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.png": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    content = file.read_bytes().replace((10**6).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip/a\.png is damaged"):
        Archives(file, [file]).read("a.png")


def test_a_tar_is_listed_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    made = of_shards(photos, tmp_path / "shards")
    first = find_images(**made)
    kept = sorted((tmp_path / "cache" / "archives").iterdir())
    assert len(kept) == 2

    def refuse(_: Path) -> Any:
        raise AssertionError("it was listed again")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_in_tar", refuse)
        again = find_images(**made)
    assert (again.names, again.left_out) == (first.names, first.left_out)
    assert [again.read(i) for i in range(12)] == [first.read(i) for i in range(12)]
    # A list that is damaged is made again, and so is that of a changed file.
    for file in kept:
        file.write_bytes(file.read_bytes()[:200])
    assert find_images(**made).names == first.names
    (shard := made["root"] / "train-000.tar").touch()
    write_tar(shard, {"x.png": b"", "x.cls": b"0"})
    assert "train-000.tar/x.png" in find_images(**made).names


def test_a_cache_that_cannot_be_written_is_told_and_not_needed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "file"))
    assert len(list_members(write_tar(tmp_path / "a.tar", contents(photos))).names) == 12
    assert "the list of an archive could not be kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "", "is empty: expected a row for each image"),
        ("a.csv", "file,label\ncats/00.jpg,cat\ncats/99.jpg,cat", "names 1 image not in"),
        (
            "a.csv",
            "cats/00.jpg,cat\ncats/00.jpg,dog",
            "line 2: cats/00.jpg is of class dog, and bef",
        ),
        ("a.csv", "cats/00.jpg,cat\ncats/03.jpg", r"line 2: \['cats/03.jpg'\]: expected a file"),
        (
            "a.csv",
            "a,b,c\n1,2,3",
            r"line 1: \['a', 'b', 'c'\]: expected columns",
        ),
        (
            "a.csv",
            "path,species\ncats/00.jpg,cat",
            r"line 1: \['path', 'species'\]: expected columns",
        ),
        ("a.csv", "id,breed\n0001,cat", r"line 1: \['id', 'breed'\]: expected columns called file"),
        ("a.csv", 'x,"\n', "line 1: no row of CSV|expected columns called file"),
        ("a.json", "{", "expected a readable JSON file"),
        ("a.json", "[1, 2]", "no labels in it; expected"),
        ("a.json", '{"labels": 3}', "labels=3; expected"),
        ("a.json", '{"labels": [["cats/00.jpg", [0.1, 0.2]]]}', "label 0 is .* vectors cannot be"),
        ("a.json", '{"labels": [["cats/00.jpg", -3]]}', "class -3: expected 0 to 999,999"),
        ("a.json", '{"labels": [["cats/00.jpg", 10000000]]}', "class 10000000: expected 0 to"),
        (
            "a.json",
            '{"labels": {"cats/00.jpg": 1, "cats/03.jpg": "x"}}',
            "classes are numbers, and",
        ),
        ("a.json", '{"labels": {}}', "names no image: expected a class for each image"),
    ],
)
def test_damaged_labels_are_told_in_a_sentence(
    name: str, text: str, told: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        find_images(photos, str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_labels_within_a_damaged_archive_are_told(photos: Path, tmp_path: Path) -> None:
    for number, content in enumerate((b"{", b"\xff\xfe", b'{"labels": [1]}')):
        file = write_zip(tmp_path / f"{number}.zip", {**contents(photos), "dataset.json": content})
        with pytest.raises(ValueError, match=rf"{number}\.zip/dataset\.json: "):
            find_images(file)


def test_images_that_labels_leave_out_are_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("cats/00.jpg,tabby\ndogs/01.png,pug\n")
    data = data_of({"root": photos, "labels": str(tmp_path / "few.csv")}, batch_size=2)
    assert data.class_names == ("pug", "tabby") and len(data.files) == 2
    assert "left out 10 (not in few.csv)" in data.report()
    assert f"labels   from {tmp_path / 'few.csv'}" in data.report()
    with pytest.raises(ValueError, match="'tabby' is not among them"):
        find_images(photos, str(tmp_path / "few.csv"), ["pug"])
    with pytest.raises(ValueError, match=r"data\.labels=none\.csv: no such file here or in"):
        find_images(photos, "none.csv")


def test_a_folder_with_dataset_json_is_read_as_before_with_a_warning(
    photos: Path, tmp_path: Path
) -> None:
    made = of_json(photos, tmp_path)
    data = data_of({"root": made["root"]})
    assert data.class_names == ("00000",)
    assert "data.labels=dataset.json takes the classes from it" in data.report()


def beside(files: Files, name: str) -> Files:
    """All images without folders, with a file beside each or all of them."""
    flat = {name.replace("/", "-"): content for name, content in files.items()}
    each = {f"{image.partition('.')[0]}{name}": b"cats" for image in flat}
    return {**flat, **(each if name.startswith(".") else {name: b"cats-00.jpg,cat"})}


@pytest.mark.parametrize("write", ["folder", "zip", "shards"])
@pytest.mark.parametrize("name", [".txt", ".cls", ".json", "labels.csv", "labels.json"])
def test_a_single_class_tells_of_what_may_be_labels(
    name: str, write: str, photos: Path, tmp_path: Path
) -> None:
    files = beside(contents(photos), name)
    if write == "zip":
        root = write_zip(tmp_path / "a.zip", files)
    elif write == "shards":
        root = write_tar(tmp_path / "a.tar", files).parent
    else:
        root = tmp_path / "flat"
        root.mkdir()
        for each, content in files.items():
            (root / each).write_bytes(content)
    data = ImageFolderData(root, 8, 1)
    told = [line for line in data.report().splitlines() if "is not read" in line]
    if name == ".cls" and write != "folder":
        assert data.class_names == ("cats",) and not told
        return
    assert len(data.class_names) == 1 and len(told) == 1
    within = "a.tar/" * (write == "shards")
    first = f"{within}cats-00{name}" if name.startswith(".") else f"{within}{name}"
    remedy = "data.labels=FILE" if name.startswith(".") else f"data.labels={first} takes"
    if name == ".json" and write != "folder":
        first, remedy = "a .json lies beside each", "data.labels=KEY"
    assert first in told[0] and remedy in told[0]
    # With labels that are stated, and with class folders, there is nothing to tell.
    (tmp_path / "all.csv").write_text(
        "".join(f"{n},{n.split('-')[0][-4:]}\n" for n in data.files.names)
    )
    stated = ImageFolderData(root, 8, 1, labels=str(tmp_path / "all.csv"))
    assert len(stated.class_names) == 3 and "is not read" not in stated.report()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.tar.gz", "but a.tar.gz, which is compressed; gunzip makes a tar of it"),
        ("more/a.zip", "but more/a.zip; data.root=.*/root/more/a.zip reads it"),
        ("a.zip b.zip", r"but a.zip; data.root='.*/root/\*.zip' reads it"),
        ("a.rar", "but a.rar, which is not read; unpack it"),
        ("a.7z", "but a.7z, which is not read; unpack it"),
        ("notes.txt", "no image found; expected files ending in .jpg"),
    ],
)
def test_a_folder_of_archives_says_how_they_are_read(name: str, told: str, tmp_path: Path) -> None:
    for each in name.split():
        file = tmp_path / "root" / each
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=told) as caught:
        find_images(tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_an_archive_of_archives_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image found, but a/b.tar in it; unpack that"):
        find_images(write_zip(tmp_path / "a.zip", {"a/b.tar": b"no image"}))


def test_classes_without_images_are_told(photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "few.csv"
    labels.write_text("cats/00.jpg,5\ncats/03.jpg,6\ndogs/01.png,6\n")
    told = ImageFolderData(photos, 8, 1, labels=str(labels)).report()
    assert "warning: 5 classes have no image: 0, 1, 2, 3, 4\n" in f"{told}\n"
    named = ImageFolderData(photos, 8, 1, class_names=[*CLASSES, "owls"]).report()
    assert "warning: 1 class has no image: owls" in named
    assert "no image:" not in ImageFolderData(photos, 8, 1).report()


def test_that_nothing_is_held_out_is_told(photos: Path) -> None:
    told = "no images are held out: val/loss is not computed"
    assert told in ImageFolderData(photos, 8, 1).report()
    assert told not in ImageFolderData(photos, 8, 1, held_out=0.1).report()


def test_small_classes_are_shown_more_often(photos: Path, tmp_path: Path) -> None:
    files = {n: c for n, c in contents(photos).items() if not n.startswith("cats/") or "00" in n}
    data = data_of({"root": write_zip(tmp_path / "few.zip", files)}, balance=1.0)
    shown = np.bincount(data.labels[data.training_images])
    assert shown.tolist() == [4, 4, 4] and len(data.files) == 9
    with pytest.raises(ValueError, match="balance=2: expected 0"):
        _ = data_of({"root": photos}, balance=2).training_images


def test_without_datasets_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets, which is not installed; pip install"):
        find_images(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_on_disk_of_other_columns_or_splits_is_told(
    photos: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    of_hub(photos, tmp_path)
    rows = datasets.load_from_disk(str(tmp_path / "hub"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"the splits train, test: expected one .*both/train"):
        find_images(tmp_path / "both")
    assert len(find_images(tmp_path / "both" / "train")) == 12
    by_id = find_images(tmp_path / "hub", "id")
    assert len(by_id.class_names) == 12
    with pytest.raises(ValueError, match=r"data\.labels=no: expected one of the columns"):
        find_images(tmp_path / "hub", "no")
    rows.remove_columns("picture").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"one column of images .*, found none"):
        find_images(tmp_path / "none")
    (arrow,) = (tmp_path / "hub").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"hub cannot be read as a data set of Hugging Face"):
        find_images(tmp_path / "hub")
