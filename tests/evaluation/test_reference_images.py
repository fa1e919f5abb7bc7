"""Sets of images: folders of sample.py, class folders, npz; shares of ranks; damaged files."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sag_dit.data.crop import read_crop
from sag_dit.evaluation.images import Source, open_images
from tests.evaluation.making import pixels
from tests.evaluation.test_reference import IMAGES, LABELS, nhwc, write_folder, write_npz


def read(
    source: Source, batch: int = 7, *, size: int | None = None, rank: int = 0, world: int = 1
) -> tuple[torch.Tensor, list[int]]:
    parts = list(open_images(source, size=size).read(batch, rank, world))
    if not parts:
        return torch.zeros(0), []
    return torch.cat([images for images, _ in parts]), torch.cat([i for _, i in parts]).tolist()


def test_sample_folder_goes_by_index(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", IMAGES)
    (tmp_path / "images" / "000003.png").unlink()
    write_folder(tmp_path / "unguided", IMAGES[:2])
    rows = [{"index": i, "label": int(label)} for i, label in enumerate(LABELS)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.yaml").touch()
    images, indices = read(tmp_path)
    left = [i for i in range(30) if i != 3]
    assert indices == left
    assert torch.equal(images, IMAGES[left])
    assert open_images(tmp_path).balance() == {"classes": 3, "fewest": 9, "most": 10}


def test_class_folders_count_over_all(tmp_path: Path) -> None:
    write_folder(tmp_path, IMAGES, LABELS)
    images, indices = read(tmp_path)
    assert indices == list(range(30))
    order = LABELS.argsort(stable=True)
    assert torch.equal(images, IMAGES[order])
    assert open_images(tmp_path).labels == LABELS[order].tolist()


@pytest.mark.parametrize("kind", ["npz", "compressed", "folder", "tensors"])
def test_ranks_share_every_image_once(kind: str, tmp_path: Path) -> None:
    source: Source = (IMAGES, LABELS)
    if kind == "npz":
        source = write_npz(tmp_path / "set.npz", arr_0=nhwc(IMAGES))
    elif kind == "compressed":
        source = tmp_path / "set.npz"
        np.savez_compressed(source, arr_0=nhwc(IMAGES))
    elif kind == "folder":
        source = write_folder(tmp_path / "images", IMAGES)
    shares = [read(source, rank=rank, world=4) for rank in range(4)]
    assert [len(indices) for _, indices in shares] == [7, 8, 7, 8]
    assert [i for _, indices in shares for i in indices] == list(range(30))
    assert torch.equal(torch.cat([images for images, _ in shares]), IMAGES)
    few = (IMAGES[:2], LABELS[:2])
    assert [len(read(few, rank=rank, world=4)[1]) for rank in range(4)] == [0, 1, 0, 1]


def test_colour_is_kept_and_crops_are_adms(tmp_path: Path) -> None:
    colour = pixels(3, 0, (12, 20, 3)).numpy()
    for i, image in enumerate(colour):
        Image.fromarray(image).save(tmp_path / f"photo{i}.png")
    images, indices = read(tmp_path)
    assert indices == [0, 1, 2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), colour)
    cropped, _ = read(tmp_path, size=8)
    assert np.array_equal(cropped[1].numpy(), read_crop(tmp_path / "photo1.png", 8))
    plain, small = open_images(tmp_path), open_images(tmp_path, size=8)
    assert small.protocol["crop"] == "ADM's centre crop to 8 pixels"
    assert plain.digest() != small.digest()


def test_colour_file_makes_digest_and_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", IMAGES[:4])
    write_folder(tmp_path / "b", IMAGES[:4])
    one, other = open_images(tmp_path / "a"), open_images(tmp_path / "b")
    assert one.digest() == other.digest()
    Image.fromarray(IMAGES[5, 0].numpy()).save(tmp_path / "b" / "000002.png")
    assert open_images(tmp_path / "b").digest() != one.digest()


def test_sets_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder; expected a folder of images"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match="a file that is not an npz"):
        open_images(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no image found"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"image 0 is torch.float32 \(1, 8, 8\); expected uint8"):
        read((IMAGES.float(), LABELS))


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:012d}" for number in (9, 12, 25, 61, 139, 192)],  # COCO's, with gaps
        [str(number) for number in range(30_071_234_507, 30_071_234_513)],  # Flickr's
        [f"2023112712345678{number:04d}" for number in range(6)],  # 20 digits
    ],
)
def test_numbers_in_names_are_no_places(tmp_path: Path, names: list[str]) -> None:
    for name, image in zip(names, IMAGES, strict=False):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{name}.png")
    images, indices = read(tmp_path)
    assert indices == list(range(6))
    assert torch.equal(images, IMAGES[:6])


@pytest.mark.parametrize("first", ["grey", "colour"])
def test_one_image_in_colour_makes_the_set_one(tmp_path: Path, first: str) -> None:
    grey, colour = IMAGES[0, 0].numpy(), pixels(3, 0, (8, 8, 3)).numpy()[0]
    order = [grey, colour, grey] if first == "grey" else [colour, grey, grey]
    for place, image in enumerate(order):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    expected = [
        np.broadcast_to(each[..., None] if each.ndim == 2 else each, (8, 8, 3)) for each in order
    ]
    for options in ({}, {"size": 8}):
        images, _ = read(tmp_path, **options)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def former_digest(folder: Path, channels: int) -> str:
    """What sets were called before there was a background."""
    total = hashlib.sha256(f"None {channels}".encode())
    for file in sorted(folder.iterdir()):
        total.update(f"{file.name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def test_sets_that_are_read_otherwise_have_another_digest(tmp_path: Path) -> None:
    """So that numbers that were measured before are not taken for those of today."""
    plain, clear, deep = (tmp_path / name for name in ("plain", "clear", "deep"))
    for folder in (plain, clear, deep):
        write_folder(folder, IMAGES[:3])
    Image.new("LA", (8, 8), (40, 0)).save(clear / "000001.png")
    Image.fromarray(np.full((8, 8), 40 * 257, np.uint16)).save(deep / "000001.png")
    assert open_images(plain).digest() == former_digest(plain, 1)
    digests = [
        open_images(folder, background=each).digest()
        for folder in (clear, deep)
        for each in ("white", "black")
    ]
    assert len({*digests, former_digest(clear, 1), former_digest(deep, 1)}) == 6
    assert read(clear)[0][1].unique().tolist() == [255]
    assert read(deep)[0][1].unique().tolist() == [40]
    # A background in colour makes colours of a grey set, one in grey does not.
    assert open_images(clear, background="red").shape[0] == 3
    assert open_images(plain, background="red").shape[0] == 1


def test_files_that_are_not_read_are_noted(tmp_path: Path) -> None:
    write_folder(tmp_path, IMAGES[:3])
    assert not open_images(tmp_path).notes
    (tmp_path / "moving.GIF").write_bytes(b"")
    assert open_images(tmp_path).notes == ["left out are 1 (.gif is not read): moving.GIF"]


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    sizes = write_folder(tmp_path / "sizes", IMAGES[:3])
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(sizes / "000002.png")
    with pytest.raises(ValueError, match=r"000002\.png has 6 x 4 pixels, others have 8 x 8"):
        read(sizes, batch=1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", IMAGES[:3])
    file = folder / "000001.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"000001\.png cannot be decoded"):
        read(folder)
    whole = write_npz(tmp_path / "set.npz", arr_0=nhwc(IMAGES))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut\.npz: damaged or no npz"):
        open_images(cut)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"arr_0 is float32 \(2, 8, 8, 3\)"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8 \(2, 3, 8, 8\)"),
        ({"arr_0": np.array([{}, None])}, "arr_0 is object"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "expected arr_0, uint8 images"),
    ],
)
def test_npz_of_something_else_is_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(write_npz(tmp_path / "set.npz", **arrays))


def test_npz_with_pickled_statistics_is_refused(tmp_path: Path) -> None:
    from sag_dit.evaluation.images import read_statistics

    file = write_npz(tmp_path / "set.npz", mu=np.array([{}, 1]), sigma=np.eye(2))
    with pytest.raises(ValueError, match="mu cannot be read"):
        read_statistics(file)
    file = write_npz(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"expected a mean \(d\) and a covariance"):
        read_statistics(file)


def bomb(file: Path, name: str, shape: tuple[int, ...], dtype: str, content: int) -> Path:
    """An npz, one of whose arrays says a shape that its zeros are not enough for."""
    header = io.BytesIO()
    header_of = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, header_of)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        if name != "arr_0":
            images = io.BytesIO()
            np.lib.format.write_array(images, nhwc(IMAGES))
            archive.writestr("arr_0.npy", images.getvalue())
        with archive.open(f"{name}.npy", "w") as entry:
            entry.write(header.getvalue())
            for _ in range(content >> 20):
                entry.write(bytes(1 << 20))
    return file


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "content", "told"),
    [
        ("arr_1", (10**14,), "i8", 0, r"arr_1 cannot be read \(it says int64 .100000000000000,."),
        ("arr_1", (2**27,), "i8", 2**30, r"arr_1 cannot be read \(it unpacks to 1,074 MB\)"),
        ("arr_0", (10**9, 8, 8, 3), "u1", 2**20, "arr_0 says it is .* and has 1,048,"),
        ("arr_0", (1, 2**14, 2**15, 1), "u1", 2**30, "arr_0 says .* or images too large"),
    ],
)
def test_npz_that_promises_too_much_costs_nothing(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str, content: int, told: str
) -> None:
    file = bomb(tmp_path / "bomb.npz", name, shape, dtype, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"bomb\.npz: {told}"):
        images = open_images(file)
        assert images.labels
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


def test_an_image_that_promises_too_many_pixels_costs_nothing(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        told = kind + content
        return struct.pack(">I", len(content)) + told + struct.pack(">I", zlib.crc32(told))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    file = tmp_path / "photos" / "huge.png"
    file.parent.mkdir()
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"huge\.png.*900000000 pixels") as caught:
        read_crop(file, 8)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


def test_pixels_that_no_file_of_its_size_can_mean_are_refused(tmp_path: Path) -> None:
    Image.new("1", (5000, 5000)).save(tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size < 25_000
    with pytest.raises(ValueError, match=r"small\.png .*5000 x 5000 pixels in .* bytes: expected"):
        read_crop(tmp_path / "small.png", 8)
    Image.new("1", (4000, 4000)).save(tmp_path / "fits.png")
    assert read_crop(tmp_path / "fits.png", 8).max() == 0


def test_npz_that_python_cannot_unpack_is_named(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "set.npz", arr_0=nhwc(IMAGES))
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] = 77  # the method of compression
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz: damaged or no npz .*compression"):
        open_images(file)
