"""ADM's centre crop, and the resolutions it may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sag_dit.data.images import center_crop, latent_size, read_crop
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
