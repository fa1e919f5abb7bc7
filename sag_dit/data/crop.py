"""From an image file to the square of pixels that is trained on: ADM's centre crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

PixelArray = NDArray[np.uint8]
MODES = {1: "L", 3: "RGB"}


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; names the file and says why.

    Example::

        try:
            pixels = read_crop(path, 256)
        except UnreadableImageError as error:
            print(error)
    """


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centre square of ``size`` pixels of an image whose short side is scaled to it.

    The image is halved by a box filter while its short side is at least 2 ``size``, then scaled by
    bicubic interpolation. A smaller image is enlarged.

    Source: openai/guided-diffusion, image_datasets.py; facebookresearch/DiT trains on it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_crop(path: Path, size: int, channels: int = 3, upright: bool = True) -> PixelArray:
    """Read a file as pixels (channels, size, size), uint8.

    ``upright`` turns photos as their camera noted; ADM's own loader ignores that note.

    Raises:
        UnreadableImageError: the file's content cannot be decoded.
        OSError: the file cannot be read, which says nothing about its content.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            pixels = np.asarray(center_crop(turned.convert(MODES[channels]), size))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost any type
        raise UnreadableImageError(f"{path} cannot be decoded ({error!r})") from None
    return np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image file, of which only the header is read.

    Raises:
        UnreadableImageError: the header cannot be decoded.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        try:
            with Image.open(stream) as image:
                return image.size
        except Exception as error:  # decoders raise almost any type
            raise UnreadableImageError(f"{path} cannot be decoded ({error!r})") from None


def latent_size(size: int, factor: int = 1, patch_size: int = 1) -> int:
    """Return the side of x_0 for images of ``size`` pixels: size / factor.

    ``factor`` is the codec's pixels per latent cell, ``patch_size`` the denoiser's cells per token.

    Raises:
        ValueError: the size is no multiple of factor times patch_size; the nearest are named.
    """
    step = factor * patch_size
    if size < 1 or size % step:
        below = size // step * step
        near = f"{below} or {below + step}" if below > 0 else str(step)
        raise ValueError(
            f"size={size}: expected a multiple of {step} pixels (autoencoder factor {factor} times "
            f"patch size {patch_size}), such as {near}"
        )
    return size // factor
