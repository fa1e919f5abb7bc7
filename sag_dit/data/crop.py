"""Reading one image file: made 8 bits, laid over a background, turned upright and cropped."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

PixelArray = NDArray[np.uint8]
FREE_PIXELS = 1 << 24
"""Pixels that any file may hold."""
PIXELS_PER_BYTE = 1000
"""Pixels for each byte of a larger image; only an image of one colour has more."""
MODES = {1: "L", 3: "RGB"}
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits: 16-bit and other whole numbers, and floats; all are grey."""
GREY = ("1", "L", "LA", *DEEP)
WHITE = "white"
TRANSPARENT, MORE_BITS = "transparent", "of more than 8 bits"
"""What of an image was read otherwise before there was a background."""

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Two tags of TIFF, and a value of the second."""
ORIENTATION, ON_ITS_SIDE = 274, (5, 6, 7, 8)
"""The camera's note how to turn a photo, and those by which width and height change places."""


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; names the file and says why.

    Example::

        try:
            pixels = read_crop(path, 256)
        except UnreadableImageError as error:
            print(error)
    """


Side: TypeAlias = int | Sequence[int]
"""Pixels along each side of a square, or [height, width]."""


def sides(size: Side) -> tuple[int, int]:
    """Return height and width of a crop.

    Raises:
        ValueError: they are no such numbers.

    Example:
        >>> sides(256), sides([128, 256])
        ((256, 256), (128, 256))
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"size={size}: expected 1 or more pixels, or [height, width]")
    return both


def told_size(size: Side) -> str:
    """Return a size as a user states it.

    Example:
        >>> told_size([256, 256]), told_size([128, 256])
        ('256', '[128,256]')
    """
    height, width = sides(size)
    return str(height) if height == width else f"[{height},{width}]"


def center_crop(image: Image.Image, size: Side) -> Image.Image:
    """Return the centre of an image that is scaled until it just covers ``size``.

    That is a square of ``size`` pixels or [height, width]. The image is halved by a box filter
    while it is at least twice as large on both sides, then scaled by bicubic interpolation. A
    smaller image is enlarged.

    Source: openai/guided-diffusion, image_datasets.py; facebookresearch/DiT trains on it.
    """
    height, width = sides(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_crop(
    path: Path,
    size: Side,
    channels: int = 3,
    upright: bool = True,
    background: str | None = WHITE,
) -> PixelArray:
    """Read the centre crop of a file as pixels (channels, height, width), uint8.

    ``upright`` turns photos as their camera noted; ADM's own loader ignores that note.
    ``background`` is the colour behind what is transparent. With None the file is read as it was
    before there was a background: transparency is dropped, so that the colours hidden by it show,
    and more than 8 bits are clipped.

    Raises:
        UnreadableImageError: the file's content cannot be decoded, or has values without a scale.
        OSError: the file cannot be read, which says nothing about its content.
    """
    return crop_of(path.read_bytes(), path, size, channels, upright, background)


def crop_of(
    content: bytes,
    path: Path,
    size: Side,
    channels: int = 3,
    upright: bool = True,
    background: str | None = WHITE,
) -> PixelArray:
    """Return the centre crop of a file's content; ``path`` is its name in errors.

    Raises:
        UnreadableImageError: the content cannot be decoded, or has values without a scale.
    """

    def crop(image: Image.Image) -> Image.Image:
        return center_crop(image, size)

    return _decoded(content, path, channels, upright, background, crop)


def read_image(
    path: Path, channels: int = 3, upright: bool = True, background: str | None = WHITE
) -> PixelArray:
    """Read a whole file as pixels (channels, height, width), uint8; see :func:`read_crop`.

    Raises:
        UnreadableImageError: the file's content cannot be decoded, or has values without a scale.
        OSError: the file cannot be read, which says nothing about its content.
    """
    return image_of(path.read_bytes(), path, channels, upright, background)


def image_of(
    content: bytes,
    path: Path,
    channels: int = 3,
    upright: bool = True,
    background: str | None = WHITE,
) -> PixelArray:
    """Return the whole image of a file's content; ``path`` is its name in errors.

    Raises:
        UnreadableImageError: the content cannot be decoded, or has values without a scale.
    """
    return _decoded(content, path, channels, upright, background, lambda image: image)


def check_pixels(size: tuple[int, int], content: int) -> None:
    """Refuse an image of more pixels than a file of ``content`` bytes can mean.

    Raises:
        ValueError: it has more.
    """
    pixels = size[0] * size[1]
    if pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * content):
        raise ValueError(
            f"{size[0]} x {size[1]} pixels in {content:,} bytes: expected at most "
            f"{PIXELS_PER_BYTE:,} for each byte"
        )


def _decoded(
    content: bytes,
    path: Path,
    channels: int,
    upright: bool,
    background: str | None,
    crop: Callable[[Image.Image], Image.Image],
) -> PixelArray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_pixels(image.size, len(content))
            turned = ImageOps.exif_transpose(image) if upright else image
            if background is not None:
                turned = in_8_bits(turned, getattr(image, "tag_v2", {}), background)
            pixels = np.asarray(crop(turned.convert(MODES[channels])))
    except MemoryError:
        raise
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{path} {error}") from None
    except Exception as error:  # decoders raise almost any type
        raise UnreadableImageError(f"{path} cannot be decoded ({error!r})") from None
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1))


def in_8_bits(
    image: Image.Image, tags: Mapping[int, Any] = MappingProxyType({}), background: str = WHITE
) -> Image.Image:
    """Return an image without transparency, 8 bits a channel; ``tags`` are those of a TIFF.

    Raises:
        UnreadableImageError: it has values without a scale.

    Example:
        >>> in_8_bits(Image.new("RGBA", (1, 1), (200, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    # A colour of the file that counts as transparent is one of its values before they are scaled.
    hidden = image.info.get("transparency")
    if image.mode in DEEP:
        values, image = np.asarray(image), _scaled(image, tags)
        if isinstance(hidden, int):
            image.putalpha(Image.fromarray((values != hidden).astype(np.uint8) * 255))
    elif isinstance(hidden, tuple) and max(hidden) > 255:
        # Of colours of 16 bits Pillow has read the upper 8.
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    if not image.has_transparency_data:
        return image
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")


def _scaled(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return a grey image of more than 8 bits, as mode L.

    Raises:
        UnreadableImageError: floats beyond 0 to 1, or whole numbers beyond 16 bits or of which
            nothing tells the greatest.
    """
    values = np.asarray(image)
    bits = tags.get(BITS_PER_SAMPLE, ())
    white = 1 if image.mode == "F" else 4095 if bits == (12,) else 65535
    least, most = values.min(), values.max()
    # A TIFF of 32 bits may hold numbers of 8 or of 16 bits, one of 16 with a sign any scale.
    signed = image.mode == "I" and bits == (16,)
    if signed or (image.mode == "I" and bits == (32,) and 0 < most <= 255):
        raise UnreadableImageError(
            f"holds whole numbers from {least:g} to {most:g} in {bits[0]} bits"
            f"{' with a sign' * signed}, and nothing tells which is white; save it with 8 bits"
        )
    if not (least >= 0 and most <= white):  # NaN is neither
        raise UnreadableImageError(
            f"holds values from {least:g} to {most:g}: expected 0 to {white}, from black to white; "
            f"save it with 8 bits"
        )
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    return Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))


class Header(NamedTuple):
    """What an image file says of itself before its pixels.

    ``unlike_before`` says what of it was read otherwise before there was a background, or nothing;
    ``pages`` whether it holds several images, of which the first is read; ``on_its_side`` whether
    width and height change places when it is turned upright.

    Example::

        width, height, *_ = read_header(path)
    """

    width: int
    height: int
    grey: bool
    unlike_before: str
    pages: bool
    on_its_side: bool


def read_header(path: Path) -> Header:
    """Read what an image file says of itself; its pixels are not read.

    Raises:
        UnreadableImageError: it cannot be decoded.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return header_of(stream, path)


def header_of(stream: IO[bytes], path: Path) -> Header:
    """Read a header from an open file; ``path`` is its name in errors.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    try:
        with Image.open(stream) as image:
            transparent = TRANSPARENT if image.has_transparency_data else ""
            unlike = MORE_BITS if image.mode in DEEP else transparent
            pages = bool(getattr(image, "is_animated", False))
            return Header(*image.size, image.mode in GREY, unlike, pages, _on_its_side(image))
    except Exception as error:  # decoders raise almost any type
        raise UnreadableImageError(f"{path} cannot be decoded ({error!r})") from None


def _on_its_side(image: Image.Image) -> bool:
    # Pillow has turned the size of a TIFF already.
    if "exif" not in image.info or image.format == "TIFF":
        return False
    try:
        return image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    except Exception:  # of a note that is damaged; decoders raise almost any type
        return False


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Return which bucket (height, width) has an image's aspect ratio most nearly.

    The distance is |log(width / height) - log(bucket's width / height)|, so that an image and the
    same one on its side are treated alike. Of equals the first is taken.

    Example:
        >>> nearest_bucket(1200, 800, [(256, 256), (192, 320), (320, 192)])
        1
    """
    ratio = math.log(width / height)
    distances = [abs(ratio - math.log(wide / high)) for high, wide in buckets]
    return distances.index(min(distances))


def buckets_by_rule(size: Side, step: int) -> list[tuple[int, int]]:
    """Return the buckets (height, width) of about one area: sides are multiples of ``step``.

    For each width from half to double the side of a square of that area, the greatest height whose
    rectangle is not larger, and the same on its side; with ``size`` itself, which is the first.

    Source: kohya-ss/sd-scripts, make_bucket_resolutions, with the half and the double as the bounds
    that it has by default at 512 pixels; after NovelAI's aspect ratio bucketing (2022).

    Example:
        >>> buckets_by_rule(64, 32)
        [(64, 64), (128, 32), (96, 32), (32, 128), (32, 96)]
    """
    height, width = sides(size)
    area, side = height * width, math.isqrt(height * width)
    found = set()
    for one in range(-(-side // 2 // step) * step, 2 * side + 1, step):
        other = min(2 * side, area // one) // step * step
        if other >= side / 2:
            found |= {(one, other), (other, one)}
    # Of a ratio the largest alone, and instead of it that of the run.
    chosen = {high / wide: (high, wide) for high, wide in sorted(found)}
    chosen.pop(height / width, None)
    return [(height, width), *sorted(chosen.values(), reverse=True)]


def check_background(background: str | None) -> None:
    """Check that a background is a colour that Pillow knows.

    Raises:
        ValueError: it is none.
    """
    try:
        opaque = background is None or len(ImageColor.getrgb(background)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise ValueError(
            f"background={background}: expected the name of a colour, such as white, or its parts "
            f"as #rrggbb"
        )
