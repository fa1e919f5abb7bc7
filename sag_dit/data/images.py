"""Images to train on: class folders as torchvision's ImageFolder reads them, or a flat folder."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.limits import check_pixels
from sag_dit.data.training_batches import Batch, Indices, NamedData, check_classes, name_hash

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
            check_pixels(image.size, len(content))
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


EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        names: paths relative to it, with ``/``.
        labels: the class of each.
        class_names: names of the class folders; of a flat folder its own name.

    Example::

        files = find_images("photos/")
        print(len(files), files.class_names, files.path(0))
    """

    root: Path
    names: tuple[str, ...]
    labels: Indices
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return where an image lies."""
        return self.root / self.names[index]


def find_images(root: str | Path) -> ImageFiles:
    """List the images below a folder: one class per folder in it, or a single class if it has none.

    Class folders are searched in depth. Hidden files and folders, and files without an image's
    ending, are left out.

    Raises:
        ValueError: no such folder, no image in it, a class without image, or images beside class
            folders.
    """
    # What stands in the folder: class folders, or images.
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"data.root={root}: {what}; expected a folder of images")
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [name for name in entries if (folder / name).is_dir()]
    loose = [name for name in entries if name not in set(classes) and _is_image(name)]
    if classes and loose:
        raise ValueError(
            f"data.root={root}: {len(loose)} images ({loose[0]}, ...) lie beside the folders "
            f"{_some(classes)}; expected either class folders or images alone"
        )
    # List the images, class by class; a flat folder is one class of its own name.
    if not classes:
        names, labels, classes = loose, [0] * len(loose), [folder.resolve().name]
    else:
        found = [sorted(_walk(folder, name)) for name in classes]
        names = [name for part in found for name in part]
        labels = [label for label, part in enumerate(found) for _ in part]
        empty = [name for name, part in zip(classes, found, strict=True) if not part]
        if names and empty:
            raise ValueError(
                f"data.root={root}: no image in {len(empty)} of {len(classes)} class folders: "
                f"{_some(empty)}; add images or remove the folders"
            )
    if not names:
        raise ValueError(
            f"data.root={root}: no image found; expected files ending in {', '.join(EXTENSIONS)}"
        )
    return ImageFiles(folder, tuple(names), np.array(labels, dtype=np.int64), tuple(classes))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _walk(root: Path, start: str) -> Iterator[str]:
    for folder, below, files in os.walk(root / start, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in files if _is_image(name))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


CHECKED_UP_FRONT = 20_000
"""Headers of at most so many images are read before the first step; that takes seconds."""

log = logging.getLogger(__name__)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Centre crops of image files, (c, size, size) uint8, with their labels.

    In place of an image that cannot be decoded stands the next image of its group, the same one
    every time, and the name of the unreadable one is logged once. With ``strict`` it is an error.
    ``groups`` says which images are to train on and which are held out, so that neither stands in
    for the other.

    Raises:
        ValueError: a value out of its range.

    Example::

        crops = Crops(find_images("photos/"), size=256)
        image, label = crops[0]
    """

    def __init__(
        self,
        files: ImageFiles,
        size: int,
        *,
        channels: int = 3,
        upright: bool = True,
        strict: bool = False,
        groups: NDArray[np.bool_] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: expected 1 or more pixels")
        if channels not in MODES:
            raise ValueError(f"channels={channels}: expected 3 (colour) or 1 (grey)")
        self.files, self.size, self.channels = files, size, channels
        self.upright, self.strict = upright, strict
        self._groups = np.zeros(len(files), dtype=np.bool_) if groups is None else groups
        # Shared with loader processes, so that an image that one has met is known to all.
        self._unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be decoded so far."""
        return [self.files.names[i] for i in self._unreadable.nonzero().flatten().tolist()]

    def read(self, index: int) -> PixelArray | None:
        """Return one crop, or None if the image cannot be decoded.

        Raises:
            UnreadableImageError: it cannot, and ``strict`` is set.
        """
        if self._unreadable[index]:
            return None
        try:
            return read_crop(self.files.path(index), self.size, self.channels, self.upright)
        except UnreadableImageError as error:
            self.note_unreadable(index, error)
            return None

    def note_unreadable(self, index: int, error: UnreadableImageError) -> None:
        """Remember an image as unreadable and log its name; with ``strict``, raise the error."""
        if self.strict:
            raise UnreadableImageError(f"{error}; remove it, or set strict=false") from None
        if not self._unreadable[index]:
            self._unreadable[index] = True
            log.warning("%s: left out", error)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__(Batch(0, [index], [False]))
        return images[0], labels[0]

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = (len(batch.indices), self.channels, self.size, self.size)
        images = np.empty(shape, dtype=np.uint8)
        labels = np.empty(len(batch.indices), dtype=np.int64)
        for place, (wanted, mirrored) in enumerate(zip(batch.indices, batch.mirrored, strict=True)):
            index, pixels = self._next_readable(wanted)
            images[place] = pixels[..., ::-1] if mirrored else pixels
            labels[place] = self.files.labels[index]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _next_readable(self, wanted: int) -> tuple[int, PixelArray]:
        for further in range(len(self.files)):
            index = (wanted + further) % len(self.files)
            if self._groups[index] != self._groups[wanted]:
                continue
            pixels = self.read(index)
            if pixels is not None:
                return index, pixels
        raise ValueError(
            f"{self.files.root}: no image can be decoded; expected intact images, or set "
            f"strict=true to learn what is wrong with each"
        )

    def inspect(self) -> None:
        """Read the headers of all images; log how many cannot be read and how many are too small.

        Raises:
            ValueError: with ``strict``, the first such image.
        """

        def size(index: int) -> tuple[int, int] | UnreadableImageError:
            try:
                return image_size(self.files.path(index))
            except UnreadableImageError as error:
                return error

        # Several threads read the headers; what is found is told in the order of the files.
        small: list[int] = []
        with ThreadPoolExecutor(8) as pool:
            for index, found in enumerate(pool.map(size, range(len(self.files)))):
                if isinstance(found, UnreadableImageError):
                    self.note_unreadable(index, found)
                elif min(found) < self.size:
                    if self.strict:
                        raise ValueError(
                            f"{self.files.path(index)} has {found[0]} x {found[1]} pixels: "
                            f"expected {self.size} or more on each side; remove it, or set "
                            f"strict=false to have small images enlarged"
                        )
                    small.append(index)
        if small:
            log.warning(
                "%d of %d images are smaller than %d pixels and are enlarged, the first is %s",
                len(small),
                len(self.files),
                self.size,
                self.files.path(small[0]),
            )


class ImageFolderData(NamedData):
    """Batches (uint8 images (b, c, size, size), labels) of a folder of images.

    ``flip`` mirrors an image with probability 1/2. ``upright`` turns photos as their camera noted.
    An image that cannot be decoded is left out, and one smaller than ``size`` is enlarged; both are
    logged. With ``strict`` either is an error.

    Raises:
        ValueError: the folder holds no usable images, or a value is out of its range.

    Example::

        trainer.fit(module, ImageFolderData("photos/", size=256, batch_size=64))
    """

    key = "folder"
    former = ("sag_dit.data.images.ImageFolderData",)

    def __init__(
        self,
        root: str | Path,
        size: int = 256,
        batch_size: int = 256,
        seed: int = 0,
        *,
        channels: int = 3,
        flip: bool = True,
        held_out: float = 0.0,
        upright: bool = True,
        strict: bool = False,
        workers: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, flip=flip, held_out=held_out, workers=workers
        )
        self.files = find_images(root)
        self.class_names = self.files.class_names
        self.channels = channels
        self._crops = Crops(
            self.files,
            size,
            channels=channels,
            upright=upright,
            strict=strict,
            groups=self.held_out_images,
        )

    @property
    def dataset(self) -> Crops:
        """The crops."""
        return self._crops

    @property
    def labels(self) -> Indices:
        """The class of every image."""
        return self.files.labels

    @cached_property
    def name_hashes(self) -> Indices:
        """The hash of every image's name."""
        return np.array([name_hash(name) for name in self.files.names], dtype=np.int64)

    def prepare_data(self) -> None:
        """Read the images' headers before the first step, unless there are very many images."""
        if self._crops.strict or len(self.files) <= CHECKED_UP_FRONT:
            self._crops.inspect()

    def teardown(self, stage: str) -> None:
        """Log how many images were left out."""
        if stage == "fit" and self._crops.skipped:
            count = len(self._crops.skipped)
            log.warning("%d of %d images were left out", count, len(self.files))

    def check(self, model: Model) -> None:
        """Check that a model can be trained on these images.

        Raises:
            ValueError: size, channels or number of classes do not fit.
        """
        channels, height, width = model.denoiser.latent_shape
        factor, crops = model.codec.factor, self._crops
        side = latent_size(crops.size, factor, model.class_conditional.network.patch_size)
        if (side, side) != (height, width):
            raise ValueError(
                f"data.size={crops.size}: expected {height * factor}, the resolution of the model "
                f"({height} x {width} cells of {factor} pixels)"
            )
        if factor == 1 and channels != crops.channels:
            raise ValueError(
                f"data.channels={crops.channels}: expected {channels}, the channels of the model"
            )
        check_classes(len(self.class_names), model.class_conditional.num_classes)
