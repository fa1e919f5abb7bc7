"""ADM's centre crop, and the resolutions it may have."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sag_dit.data.crop import (
    UnreadableImageError,
    center_crop,
    check_background,
    read_crop,
    read_header,
    read_image,
)
from sag_dit.data.images import latent_size
from tests.data.making import picture


def adm_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The published rule, on arrays of (h, w, 3): halve, scale the short side, cut the middle."""

    def resized(width: int, height: int, how: int) -> np.ndarray:
        return np.array(Image.fromarray(pixels).resize((width, height), how))

    height, width = pixels.shape[:2]
    while not min(height, width) < size * 2:
        height, width = height // 2, width // 2
        pixels = resized(width, height, Image.Resampling.BOX)
    ratio = size / min(height, width)
    height, width = round(height * ratio), round(width * ratio)
    pixels = resized(width, height, Image.Resampling.BICUBIC)
    y, x = (height - size) // 2, (width - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(16, 16), (32, 32), (31, 33), (64, 40), (40, 64), (127, 71), (300, 65), (9, 30), (16, 97)],
)
def test_crop_is_adms(width: int, height: int) -> None:
    random = np.random.default_rng(width)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16))
    np.testing.assert_array_equal(cropped, adm_crop(pixels, 16))


def test_halving_averages_four_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean = pixels.reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16)).astype(float)
    assert np.abs(cropped - mean).max() <= 1  # rounded once along each side


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    picture(20, 30).convert(mode).save(path)
    pixels = read_crop(path, 16, channels)
    assert pixels.shape == (channels, 16, 16) and pixels.dtype == np.uint8
    assert pixels.std() > 5


def test_photos_are_turned_as_their_camera_noted(tmp_path: Path) -> None:
    upright = picture(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(upright).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_crop(tmp_path / "turned.png", 32), expected)
    as_adm = read_crop(tmp_path / "turned.png", 32, upright=False)
    np.testing.assert_array_equal(as_adm, np.rot90(expected, axes=(1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((250, 8, 2), "size=250: expected a multiple of 16 .* such as 240 or 256"),
        ((264, 8, 2), "such as 256 or 272"),
        ((8, 8, 2), "such as 16"),
        ((-16, 8, 2), "such as 16"),
    ],
)
def test_resolution_must_suit_patch_and_autoencoder(
    arguments: tuple[int, int, int], message: str
) -> None:
    assert latent_size(256, 8, 2) == 32
    with pytest.raises(ValueError, match=message):
        latent_size(*arguments)


# --- more than 8 bits, transparency, and how both were read before --------------------------------

RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
GREY_8 = np.rint(RAMP * 255).astype(np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("file", "pixels"),
    [
        ("16.png", GREY_8.astype(np.uint16) * 257),
        ("16.tiff", GREY_8.astype(np.uint16) * 257),
        ("big-endian.tiff", GREY_8.astype(">u2") * 257),
        ("16.pgm", GREY_8.astype(np.uint16) * 257),
        ("32.tiff", GREY_8.astype(np.int32) * 257),
        ("float.tiff", GREY_8.astype(np.float32) / 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_scaled(
    file: str, pixels: np.ndarray, channels: int, tmp_path: Path
) -> None:
    path = saved(Image.fromarray(pixels), tmp_path / file)
    expected = np.broadcast_to(GREY_8, (channels, 32, 32))
    np.testing.assert_array_equal(read_image(path, channels), expected)
    np.testing.assert_array_equal(read_crop(path, 32, channels), expected)
    header = read_header(path)
    assert (header.grey, header.unlike_before) == (True, "of more than 8 bits")
    # A run that was begun before there was a background goes on with what it read then.
    with Image.open(path) as image:
        before = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_crop(path, 32, 1, background=None)[0], before)
    assert len(np.unique(before)) < 20


def test_tiff_may_count_from_white(tmp_path: Path) -> None:
    shorts = Image.fromarray(GREY_8.astype(np.uint16) * 257)
    path = saved(shorts, tmp_path / "white-is-zero.tiff", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_image(path, 1)[0], 255 - GREY_8)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype(np.float32) * 255, r"a\.tiff holds values from 0 to 255: expected 0 to 1"),
        (RAMP.astype(np.float32) - 0.5, r"from -0\.5 to 0\.5"),
        (np.full((9, 9), np.nan, np.float32), "from nan to nan"),
        (np.full((9, 9), 70_000, np.int32), "70000: expected 0 to 65535"),
        (np.full((9, 9), -1, np.int32), "from -1 to -1"),
        (GREY_8.astype(np.int32), "from 0 to 255 in 32 bits, and nothing tells which is white"),
    ],
)
def test_values_without_a_scale_are_refused(
    pixels: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = saved(Image.fromarray(pixels), tmp_path / "a.tiff")
    with pytest.raises(UnreadableImageError, match=message):
        read_crop(path, 8)


def test_shorts_with_a_sign_have_no_scale(tmp_path: Path) -> None:
    image = Image.fromarray(GREY_8.astype(np.uint16) * 128)
    path = saved(image, tmp_path / "a.tiff", tiffinfo={339: 2})
    with pytest.raises(UnreadableImageError, match="to 32640 in 16 bits with a sign"):
        read_crop(path, 8)


def half_hidden(mode: str) -> tuple[Image.Image, dict[str, object]]:
    """The left half is transparent, and red where the mode has colours; how it is saved."""
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:, :16, 0], colour[:, 16:, 2] = 255, 255
    alpha = np.repeat(np.array([0, 255], np.uint8), 16)[None].repeat(32, 0)
    plain = Image.fromarray(colour)
    if mode in ("RGBA", "LA"):
        image = plain.convert(mode)
        image.putalpha(Image.fromarray(alpha))
        return image, {}
    if mode == "P":
        palette = plain.quantize(2)
        return palette, {"transparency": palette.getpixel((0, 0))}
    if mode == "RGB":
        return plain, {"transparency": (255, 0, 0)}
    if mode == "L":
        return plain.convert("L"), {"transparency": plain.convert("L").getpixel((0, 0))}
    shorts = np.where(alpha > 0, 20_000, 30_000).astype(np.uint16)
    return Image.fromarray(shorts), {"transparency": 30_000}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_lies_over_the_background(mode: str, tmp_path: Path) -> None:
    image, options = half_hidden(mode)
    path = saved(image, tmp_path / "a.png", **options)
    over_white, over_green = read_image(path), read_image(path, background="#00ff00")
    assert over_white[:, 0, 0].tolist() == [255, 255, 255]
    assert over_green[:, 0, 0].tolist() == [0, 255, 0]
    np.testing.assert_array_equal(over_white[:, :, 16:], over_green[:, :, 16:])
    before = read_image(path, background=None)
    if mode != "I;16":
        np.testing.assert_array_equal(over_white[:, :, 16:], before[:, :, 16:])
        assert before[:, 0, 0].tolist() != [255, 255, 255]
    assert read_header(path).unlike_before


def test_a_colour_of_16_bits_may_be_transparent(tmp_path: Path) -> None:
    """Pillow cannot write such a file, so this one is made by hand."""
    row = b"\0" + struct.pack(">3H", 60_000, 100, 7) * 2 + struct.pack(">3H", 0, 0, 65_535) * 2
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"tRNS", struct.pack(">3H", 60_000, 100, 7)),
        (b"IDAT", zlib.compress(row * 4)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "a.png").write_bytes(content)
    pixels = read_image(tmp_path / "a.png")
    assert pixels[:, 0].T.tolist() == [[255, 255, 255]] * 2 + [[0, 0, 255]] * 2


def test_tiff_of_12_bits_is_scaled(tmp_path: Path) -> None:
    """Pillow cannot write such a file, so this one is made by hand: two values in three bytes."""
    values = [0, 4095, 2048, 1024]
    data = b"".join(
        struct.pack(">I", (one << 12) | two)[1:] for one, two in (values[:2], values[2:])
    )
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in [*tags, (279, 6)])
    header = b"II*\0" + struct.pack("<IH", 8, 9) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tiff").write_bytes(header + data)
    assert read_image(tmp_path / "a.tiff", 1).tolist() == [[[0, 255, 128, 64]]]


def test_half_of_a_colour_is_mixed_with_the_background(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), tmp_path / "a.webp", lossless=True)
    assert read_image(path)[:, 0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_images_of_8_bits_are_read_as_before(
    mode: str, channels: int, tmp_path: Path
) -> None:
    path = saved(picture(20, 30).convert(mode), tmp_path / "image.tiff")
    now, before = (read_crop(path, 16, channels, background=each) for each in ("black", None))
    np.testing.assert_array_equal(now, before)


def test_cmyk_photos_keep_their_colours(tmp_path: Path) -> None:
    image = picture(32, 32)
    path = saved(image.convert("CMYK"), tmp_path / "a.jpg", quality=95)
    difference = read_image(path).astype(int) - np.asarray(image).transpose(2, 0, 1)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("colour", ["whit", "#12", "255", "#ffffff80"])
def test_a_background_is_a_colour(colour: str) -> None:
    with pytest.raises(ValueError, match=f"background={colour}: expected the name of a colour"):
        check_background(colour)
    for known in ("white", "#00ff7f", "hsl(0, 100%, 50%)", None):
        check_background(known)


def test_a_rectangle_is_the_middle_of_an_image_that_covers_it() -> None:
    ramp = np.tile(np.arange(120, dtype=np.uint8), (40, 1))
    image = Image.fromarray(ramp)
    for size in ((16, 16), (10, 30), (16, 24), (20, 60)):
        height, width = size
        found = np.asarray(center_crop(image, size)).astype(float)
        assert found.shape == size
        # The whole height is kept of so wide an image, so the scale is the height's.
        seen = width * 40 / height
        middle = found[:, [0, -1]].mean()
        assert abs(found[height // 2, -1] - found[height // 2, 0] - seen) < 40 / height + 6
        assert abs(middle - 59.5) < 3
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70), dtype=np.uint8))
    np.testing.assert_array_equal(center_crop(square, 16), center_crop(square, [16, 16]))
