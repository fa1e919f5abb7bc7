"""32x32 crops of fourteen photographs that scikit-image and scikit-learn carry, no download.

Every photograph is scaled to 288 x 288 pixels (ADM's centre crop), so that a crop of 32 shows
several bricks, stones or blood vessels and not one edge, and so that all weigh the same. One
quarter of each, 144 x 144, is held out: no crop to train on shares a pixel with it.

The quarter was chosen whose crops are most like those of the rest, by the Frechet distance of their
mean colours, contrasts and gradients. With another one a distance to the held-out crops would also
measure the photograph's composition: the upper right quarter of ``china``, for example, is empty
sky.

A held-out quarter is four blocks of 72 x 72. The two on its falling diagonal are to choose settings
with (``tune``), the two on the rising one to report them (``report``); crops do not cross blocks.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib.resources import as_file, files
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.crop import read_crop
from sag_dit.data.training_batches import Batch, StepData
from sag_dit.tensors import Images, Labels

SIZE = 32
PHOTOGRAPH = 288
QUARTER = PHOTOGRAPH // 2
BLOCK = QUARTER // 2
STRIDE = 10
"""Between the corners of held-out crops: 25 in a block, 100 in a quarter."""

HELD_OUT_QUARTERS = {
    "astronaut": ("skimage/data/astronaut.png", "upper left"),
    "brick": ("skimage/data/brick.png", "lower right"),
    "chelsea": ("skimage/data/chelsea.png", "lower right"),
    "china": ("sklearn/datasets/images/china.jpg", "upper left"),
    "coffee": ("skimage/data/coffee.png", "upper left"),
    "flower": ("sklearn/datasets/images/flower.jpg", "upper left"),
    "grass": ("skimage/data/grass.png", "upper left"),
    "gravel": ("skimage/data/gravel.png", "upper left"),
    "hubble": ("skimage/data/hubble_deep_field.jpg", "lower right"),
    "ihc": ("skimage/data/ihc.png", "upper right"),
    "moon": ("skimage/data/moon.png", "upper right"),
    "motorcycle": ("skimage/data/motorcycle_left.png", "lower right"),
    "retina": ("skimage/data/retina.jpg", "lower left"),
    "rocket": ("skimage/data/rocket.jpg", "lower right"),
}
"""Class name -> where the photograph lies, and its quarter that is held out."""

CLASS_NAMES = tuple(HELD_OUT_QUARTERS)

Split = Literal["held_out", "tune", "report"]
Places = NDArray[np.int64]
"""(n, 3): class, and row and column of a crop's upper left pixel in the scaled photograph."""


@cache
def photographs() -> NDArray[np.uint8]:
    """Return the scaled photographs (14, 3, 288, 288), uint8; grey ones have three equal channels.

    Raises:
        ValueError: scikit-image is not installed, or does not carry a photograph.
    """
    read = []
    for file, _ in HELD_OUT_QUARTERS.values():
        package, *path = file.split("/")
        try:
            with as_file(files(package).joinpath(*path)) as found:
                read.append(read_crop(found, PHOTOGRAPH))
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise ValueError(
                f"data=patches: {file} is not there ({error}); the photographs come with "
                f"scikit-image 0.26 and scikit-learn: pip install -e '.[eval]'"
            ) from None
    return np.stack(read)


def quarter(name: str) -> tuple[int, int]:
    """Return row and column of the upper left pixel of a photograph's held-out quarter."""
    _, where = HELD_OUT_QUARTERS[name]
    return QUARTER * ("lower" in where), QUARTER * ("right" in where)


@cache
def training_places() -> Places:
    """Return every crop, pixel by pixel, that does not touch its photograph's held-out quarter."""
    corners = np.arange(PHOTOGRAPH - SIZE + 1)
    parts = []
    for label, name in enumerate(CLASS_NAMES):
        row, column = (
            (corners + SIZE > start) & (corners < start + QUARTER) for start in quarter(name)
        )
        free = np.argwhere(~(row[:, None] & column[None]))
        parts.append(np.insert(free, 0, label, axis=1))
    return np.concatenate(parts)


@cache
def held_out_places(split: Split = "held_out") -> Places:
    """Return the crops of a split on a regular grid: 1,400 held out, 700 of them in each half."""
    blocks = {"tune": [(0, 0), (1, 1)], "report": [(0, 1), (1, 0)]}
    blocks["held_out"] = blocks["tune"] + blocks["report"]
    steps = range(0, BLOCK - SIZE + 1, STRIDE)
    return np.array(
        [
            (label, top + BLOCK * down + row, left + BLOCK * right + column)
            for label, (top, left) in enumerate(map(quarter, CLASS_NAMES))
            for down, right in blocks[split]
            for row in steps
            for column in steps
        ]
    )


def cut(places: Places) -> tuple[Images, Labels]:
    """Return the crops (b, 3, 32, 32), uint8, at some places, and their classes."""
    windows = np.lib.stride_tricks.sliding_window_view(photographs(), (SIZE, SIZE), axis=(2, 3))
    label, row, column = places.T
    return torch.from_numpy(windows[label, :, row, column]), torch.from_numpy(label.copy())


def patches(split: Split) -> tuple[Images, Labels]:
    """Return the held-out crops (b, 3, 32, 32), uint8, and labels: all, or one half of them."""
    return cut(held_out_places(split))


class PatchCrops(Dataset[tuple[Tensor, Tensor]]):
    """Crops at a list of places, mirrored where the batch says so.

    Example::

        crops = PatchCrops(held_out_places("tune"))
        images, labels = crops.__getitems__(Batch(0, [0, 1], [False, True]))
    """

    def __init__(self, places: Places) -> None:
        self.places = places

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = cut(self.places[batch.indices])
        mirrored = torch.tensor(batch.mirrored)
        images[mirrored] = images[mirrored].flip(-1)
        return images, labels


class Patches(StepData):
    """Batches (uint8 crops (b, 3, 32, 32), classes), the held-out crops for validation.

    A training step takes the next crops of a shuffled list of all 634,382 places, as many of each
    photograph; ``flip`` mirrors half of them.

    Raises:
        ValueError: the photographs are not there, or a value is out of its range.

    Example::

        trainer.fit(module, Patches(batch_size=64))
    """

    key = "patches"
    former = ("sag_dit.data.patches.Patches",)

    class_names = CLASS_NAMES
    channels = 3

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        *,
        flip: bool = True,
        workers: int | None = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, flip=flip, workers=workers)
        photographs()
        self._places = np.concatenate([training_places(), held_out_places()])

    @property
    def dataset(self) -> PatchCrops:
        """The crops to train on, then the held-out ones."""
        return PatchCrops(self._places)

    @cached_property
    def held_out_images(self) -> NDArray[np.bool_]:
        """Which crops lie in the held-out quarters."""
        return np.arange(len(self._places)) >= len(training_places())

    def check(self, model: Model) -> None:
        """Refuse a model that does not draw 32x32 colour images of as many classes.

        Raises:
            ValueError: what does not fit.
        """
        shape = model.denoiser.latent_shape
        if model.codec.factor != 1 or shape != (3, SIZE, SIZE):
            raise ValueError(
                f"a model of {shape}: the patches are (3, 32, 32) pixels; set resolution=32 and "
                f"vae=null"
            )
        self.check_classes(model)
