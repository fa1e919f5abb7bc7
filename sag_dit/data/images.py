"""Images to train on: class folders as torchvision's ImageFolder reads them, or a flat folder."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.crop import (
    MODES,
    PixelArray,
    UnreadableImageError,
    image_size,
    latent_size,
    read_crop,
)
from sag_dit.data.folder import ImageFiles, find_images
from sag_dit.data.training_batches import Batch, Indices, NamedData, check_classes, name_hash

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
