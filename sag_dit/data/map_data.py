"""Data sets of the user's own: any map data set of (image, label), or a LightningDataModule of one.

Their images are put in batches as all others are, by seed and step. What is random in them, such as
torchvision's transforms, is seeded for every image of every step.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from sag_dit.checkpoints import Model
from sag_dit.codec import VAECodec
from sag_dit.data.crop import GREY, MODES, UnreadableImageError, in_8_bits
from sag_dit.data.training_batches import (
    Batch,
    Indices,
    NamedData,
    StepData,
    balanced,
    name_hash,
    validation_batches,
    with_checked_labels,
)
from sag_dit.messages import counted
from sag_dit.noise import generator
from sag_dit.raised import failure, reason_of

ITEM = 10
"""Purpose of the random streams of single items, see :func:`sag_dit.noise.generator`."""
LOOKED_AT = 16
"""Images that a fingerprint looks at, where a data set has none of its own."""
COMPARED = 5
"""Items that are compared at the start with the labels that the data set tells."""
MANY = 1_000
"""Items that are read one by one for their labels without a word."""
CHANNELS = (1, 3, 4)
"""Channels that images have: where they are last, and not first, the axes are in another order."""
EXPECTED = (
    "expected (image, label): uint8 pixels (c, h, w), a tensor or numpy array, or an image of "
    "Pillow, or x_0 as floats; and a whole number"
)

log = logging.getLogger(__name__)


@runtime_checkable
class LabelledImages(Protocol):
    """What a data set must have to be trained on.

    An image is uint8 pixels (c, h, w), an image of Pillow, or x_0 itself as floats: of pixels from
    -1 to 1, or latents. Pixels and x_0 are tensors or arrays of numpy. All have one shape. A label
    is a whole number, 0 or more.

    A data set may also have

        class_names   a name for each class (or ``classes``, as torchvision calls them); else they
                      are called by their numbers
        labels        the class of every image (or ``targets``), the same that its item has; else
                      every item is read for it once
        fingerprint   a text that changes with the images, or a function that returns it; else some
                      of the images are looked at

    Example:
        >>> isinstance([(0, 1)], LabelledImages)
        True
    """

    def __len__(self) -> int:
        """Return how many images there are."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Return an image and its label."""


def seed_item(seed: int, step: int, index: int) -> None:
    """Seed the generators of Python, numpy and torch for one image of one step."""
    bits = int(generator(seed, step, index, ITEM).integers(2**63))
    random.seed(bits)
    np.random.seed(bits % 2**32)
    torch.default_generator.manual_seed(bits)


class Items(Dataset[Any]):
    """Serves batches of a map data set; what is random in an item follows (seed, step, index).

    ``collate`` makes a batch of items, None stacks them. With ``steps`` a batch tells its step.

    Raises:
        ValueError: an item is no (image, label), of another shape or type than the first, of
            another class than ``told`` says, or holds a number that is not finite.

    Example::

        items = Items(dataset, "Shapes", seed=0)
        images, labels = items.__getitems__(Batch(0, [3, 7], [False, False]))
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        seed: int,
        collate: Callable[[list[Any]], Any] | None = None,
        steps: bool = False,
    ) -> None:
        self.dataset, self.name, self.seed = dataset, name, seed
        self.collate, self.steps = collate, steps
        self.told: Indices | None = None
        """The classes that the data set tells beside its items, None where it tells none."""
        self.classes: int | None = None
        """How many classes there are, once that is known."""
        # Noted, since what is drawn at random depends on it.
        self._count = _length(dataset, name)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def first(self) -> Tensor:
        """The first image, which says what all have to be like."""
        image: Tensor = self.__getitems__(Batch(0, [0], [False]))[0][0]
        return image

    def item(self, index: int, step: int = 0) -> tuple[Tensor, int]:
        """Return an image as a tensor, and its label."""
        image, label = self._pair(self._raw(index, step), index)
        return self._tensor(image, index), label

    def compare(self, index: int, label: int) -> None:
        """Compare the label of an item with the one that the data set tells for it.

        Raises:
            ValueError: they differ, or there are fewer classes.
        """
        if self.classes is not None and not 0 <= label < self.classes:
            raise ValueError(
                f"{self.name}: item {index} is of class {label}, and the data has "
                f"{counted(self.classes, 'class', 'classes')}: expected 0 to {self.classes - 1}"
            )
        if self.told is not None and self.told[index] != label:
            raise ValueError(
                f"{self.name}: item {index} has label {label}, and its labels say "
                f"{self.told[index]}: expected one class for each image; mend labels (or targets), "
                f"whose places are those of the items, or leave it out"
            )

    def _raw(self, index: int, step: int) -> Any:
        seed_item(self.seed, step, index)
        try:
            return self.dataset[index]
        except Exception as error:
            raise ValueError(f"{self.name}: item {index}: {reason_of(error)}") from error

    def _pair(self, found: Any, index: int) -> tuple[Any, int]:
        told = f"{self.name}: item {index} is"
        several = isinstance(found, (tuple, list))
        if not several or len(found) != 2:
            count = f" of {len(found)} values" if several else ""
            raise ValueError(f"{told} a {type(found).__name__}{count}: {EXPECTED}")
        image, label = found
        single = isinstance(label, (Tensor, np.ndarray)) and np.prod(label.shape) == 1
        number = label.item() if single else label
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
            raise ValueError(
                f"{told} of label {_in_a_line(label)}: expected the number of its class, a whole "
                f"number, 0 or more"
            )
        if number < 0:
            raise ValueError(f"{told} of label {number}: expected 0 or more")
        self.compare(index, int(number))
        return image, int(number)

    def _tensor(self, image: Any, index: int) -> Tensor:
        # An image of Pillow becomes pixels, channels first.
        if isinstance(image, Image.Image):
            mode = "L" if image.mode in GREY else "RGB"
            try:
                pixels = np.asarray(in_8_bits(image).convert(mode))
            except UnreadableImageError as error:
                raise ValueError(f"{self.name}: item {index} {error}") from None
            image = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy()
        # Pixels stay as they are, other numbers become finite floats.
        array = isinstance(image, (Tensor, np.ndarray))
        if not array or len(image.shape) != 3 or not _pixels_or_floats(image):
            what = f"{image.dtype} {tuple(image.shape)}" if array else type(image).__name__
            raise ValueError(f"{self.name}: item {index} has an image that is {what}: {EXPECTED}")
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy())
        if image.dtype != torch.uint8:
            image = image.float()
            if not image.isfinite().all():
                raise ValueError(
                    f"{self.name}: item {index} holds NaN or infinite values: expected finite "
                    f"ones; mend or leave out what it is read from"
                )
        # All are like the first.
        first = self.__dict__.get("first", image)
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            sizes = image.shape[1:] != first.shape[1:]
            remedy = "crop them" if sizes else "convert them, as image.convert('RGB') of Pillow,"
            raise ValueError(
                f"{self.name}: item {index} is {image.dtype} {tuple(image.shape)}, the first "
                f"{first.dtype} {tuple(first.shape)}: expected one shape and type; {remedy} alike"
            )
        return torch.as_tensor(image).detach()

    def __getitems__(self, batch: Batch) -> Any:
        # What the item draws at random is its own, and takes nothing from what comes after.
        with isolate_rng(include_cuda=False):
            if self.collate is None:
                items = [self.item(index, batch.step) for index in batch.indices]
                images, labels = default_collate(items)
            else:
                raw = [self._raw(index, batch.step) for index in batch.indices]
                for index, item in zip(batch.indices, raw, strict=True):
                    self._compare_raw(item, index)
                seed_item(self.seed, batch.step, len(self))
                images, labels = self._collated(self.collate(raw))
        return (images, labels, batch.step) if self.steps else (images, labels)

    def _compare_raw(self, item: Any, index: int) -> None:
        """Compare the label of what only ``collate`` understands, if it is a pair with a number."""
        if isinstance(item, (tuple, list)) and len(item) == 2:
            label = item[1].item() if getattr(item[1], "shape", None) == () else item[1]
            if isinstance(label, (int, np.integer)):
                self.compare(index, int(label))

    def _collated(self, found: Any) -> tuple[Tensor, Tensor]:
        pair = isinstance(found, (tuple, list)) and len(found) == 2
        images, labels = found if pair else (None, None)
        fits = isinstance(images, Tensor) and images.ndim == 4 and _pixels_or_floats(images)
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor) or not fits:
            what = type(found).__name__
            if isinstance(images, Tensor):
                what += f" with images {images.dtype} {tuple(images.shape)}"
            raise ValueError(
                f"{self.name}: its collate_fn makes a {what}: expected images (b, c, h, w), uint8 "
                f"or floats, and labels (b)"
            )
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        pixels = images.dtype == torch.uint8
        # Labels of another kind are refused where their batch is, not rounded.
        images = images.detach() if pixels else images.detach().float()
        return images, labels.long() if whole else labels


def _length(dataset: Any, name: str) -> int:
    """Return how many items a data set has.

    Raises:
        ValueError: it does not tell.
    """
    try:
        return len(dataset)
    except Exception as error:  # Whatever a data set of somebody's raises.
        raise ValueError(
            f"{name}: its length fails with {failure(error)}: expected how many images "
            f"there are, a whole number"
        ) from error


def _in_a_line(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.60}"


def _pixels_or_floats(image: Tensor | NDArray[Any]) -> bool:
    if isinstance(image, np.ndarray):
        return image.dtype in (np.uint8, np.float16, np.float32, np.float64)
    return image.dtype == torch.uint8 or image.dtype.is_floating_point


class MapData(NamedData):
    """Batches (images, labels) of a map data set of (image, label), see :class:`LabelledImages`.

    ``held_out`` is the share of the images that is kept for validation, ``balance`` repeats the
    images of small classes, see :func:`balanced`. ``validation`` is a second data set, to validate
    with. The other arguments are what a LightningDataModule brings, see :meth:`of`.

    Raises:
        ValueError: the data set has no length, no image, or items of another kind; or a value is
            out of its range.

    Example::

        trainer.fit(module, MapData(torchvision_dataset, batch_size=64, held_out=0.1))
    """

    kind: ClassVar[type] = StepData
    """What needs no ``MapData`` around it."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 64,
        seed: int = 0,
        *,
        held_out: float = 0.0,
        balance: float = 0.0,
        workers: int | None = None,
        validation: Any = None,
        collate: Callable[[list[Any]], Any] | None = None,
        validation_collate: Callable[[list[Any]], Any] | None = None,
        module: LightningDataModule | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, flip=False, held_out=held_out, workers=workers
        )
        # The data set, and what it says of itself.
        self._name = type(module or dataset).__name__
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{self._name} streams its items: expected a data set with a length and items by "
                f"number, so that a run can go on where it stopped; tar shards can be read as "
                f"data=folder data.root=SHARDS"
            )
        if not hasattr(dataset, "__len__") or not _length(dataset, self._name):
            raise ValueError(
                f"{self._name}: expected a data set with a length, of 1 or more images"
            )
        if validation is not None and held_out:
            raise ValueError(
                f"held_out={held_out}: {self._name} brings images to validate with; expected 0"
            )
        self.balance, self.module = balance, module
        hooked = module is not None and overridden(module, "on_after_batch_transfer")
        self._items = Items(dataset, self._name, seed, collate, hooked)
        self._validation = None
        if validation is not None:
            self._validation = Items(validation, self._name, seed, validation_collate, hooked)
        self._items.first  # noqa: B018, so that loader processes know it
        if self._validation is not None:
            one, other = self._items.first, self._validation.first
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"{self._name} trains on {one.dtype} {tuple(one.shape)} and validates with "
                    f"{other.dtype} {tuple(other.shape)}: expected one shape and type"
                )
        self.channels = len(self._items.first)
        # Its classes.
        named = self._told("class_names", "classes")
        listed = isinstance(named, Iterable) and not isinstance(named, (str, Mapping, Set))
        if named is not None and not listed:
            raise ValueError(
                f"{self._name}: its class names are a {type(named).__name__}: expected a list of "
                f"names, that of class 0 first"
            )
        most = int(self.labels.max()) + 1
        self.class_names = tuple(map(str, range(most) if named is None else named))
        beyond = self.image_beyond(len(self.class_names))
        if beyond:
            names = counted(len(self.class_names), "class name")
            raise ValueError(f"{self._name} has {names}: expected one for each class{beyond}")
        twice = [name for name in self.class_names if self.class_names.count(name) > 1]
        if twice:
            raise ValueError(f"{self._name}: two of its classes are called {twice[0]!r:.60}")
        # What training reads has to be of the classes that are told.
        if self._validation is not None:
            self._validation.told = told_labels(self._validation, self._validation.dataset)
        for items in filter(None, (self._items, self._validation)):
            items.classes = len(self.class_names)
            self._compare_some(items)

    def _compare_some(self, items: Items) -> None:
        """Read the first item, the last and some between, as training reads them."""
        places = np.linspace(0, len(items) - 1, min(COMPARED, len(items))).round().astype(int)
        images = np.unique(places).tolist()
        _, labels, *_ = items.__getitems__(Batch(0, images, [False] * len(images)))
        with_checked_labels((images, labels), items.name, len(self.class_names))

    @classmethod
    def of(
        cls,
        thing: Any,
        batch_size: int | None = None,
        seed: int = 0,
        *,
        held_out: float = 0.0,
        balance: float = 0.0,
        workers: int | None = None,
    ) -> StepData:
        """Return the data of a data set or of a LightningDataModule; a ``StepData`` as it is.

        Of a LightningDataModule the data sets of its two loaders are taken, their size of a batch
        (over all ranks) and processes unless others are stated, and ``collate_fn``; its images come
        in the order of ``seed`` and step.

        Raises:
            ValueError: it has a sampler, hooks or state that this order leaves no room for, or
                streams.
        """
        if isinstance(thing, StepData):
            return thing
        if not isinstance(thing, LightningDataModule):
            return cls(
                thing,
                64 if batch_size is None else batch_size,
                seed,
                held_out=held_out,
                balance=balance,
                workers=workers,
            )
        name = type(thing).__name__
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device"):
            if overridden(thing, hook):
                raise ValueError(
                    f"{name} has its own {hook}, which is not called here: expected "
                    f"on_after_batch_transfer, or the same done in its data set"
                )
        for hook in ("state_dict", "load_state_dict"):
            if overridden(thing, hook):
                raise ValueError(
                    f"{name} has its own {hook}, which is not called here, since batches follow "
                    f"the seed and the step: expected a module without state; leave it out"
                )
        # As Lightning does it, in one process of each machine.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            thing.prepare_data()
        thing.setup("fit")
        loader = map_loader(thing.train_dataloader(), f"{name}.train_dataloader")
        validation = None
        if overridden(thing, "val_dataloader"):
            found = thing.val_dataloader()
            if found:
                validation = map_loader(found, f"{name}.val_dataloader")
        return cls(
            loader.dataset,
            loader.batch_size if batch_size is None else batch_size,  # type: ignore[arg-type]
            seed,
            held_out=held_out,
            balance=balance,
            workers=loader.num_workers if workers is None else workers,
            validation=None if validation is None else validation.dataset,
            collate=own_collate(loader),
            validation_collate=None if validation is None else own_collate(validation),
            module=thing,
        )

    def _told(self, *names: str) -> Any:
        """Return what the data set or its module says under one of several names, else None."""
        return told_by((self._items.dataset, self.module), *names)

    @property
    def dataset(self) -> Items:
        """The items."""
        return self._items

    @cached_property
    def labels(self) -> Indices:
        """The class of every image, as the data set tells it, or read one by one."""
        count = len(self._items)
        told = self._items.told = told_labels(self._items, self._items.dataset, self.module)
        if told is None:
            if count > MANY:
                log.warning(
                    "%s has no labels: its %d items are read once for them; an attribute labels "
                    "makes that unnecessary",
                    self._name,
                    count,
                )
            with isolate_rng(include_cuda=False):
                told = np.array(
                    [
                        self._items._pair(self._items._raw(index, 0), index)[1]
                        for index in range(count)
                    ]
                )
        return told

    def named(self, index: int) -> str:
        """Return which item an image is."""
        return f"item {index}"

    @property
    def called(self) -> str:
        """The name of the data set's class, or of its module's."""
        return self._name

    @property
    def other_images(self) -> int:
        """How many images the second data set has."""
        return 0 if self._validation is None else len(self._validation)

    @cached_property
    def name_hashes(self) -> Indices:
        """A hash of every image's number."""
        return np.array([name_hash(str(number)) for number in range(len(self._items))])

    @cached_property
    def training_images(self) -> Indices:
        """The images of an epoch, those of small classes repeated."""
        return balanced(super().training_images, self.labels, self.balance)

    def listing_sha256(self) -> str:
        """Return a sha256 of the labels and of what the data set's fingerprint says.

        Without one, of some of its images.
        """
        total = hashlib.sha256(self.labels.tobytes())
        for thing in (self._items.dataset, self.module):
            told = getattr(thing, "fingerprint", None)
            if told is not None:
                total.update(str(told() if callable(told) else told).encode())
                return total.hexdigest()
        count = len(self._items)
        places = np.unique(np.linspace(0, count - 1, min(LOOKED_AT, count)).round().astype(int))
        images = self._items.__getitems__(Batch(0, places.tolist(), [False] * len(places)))[0]
        total.update(images.numpy().tobytes())
        return total.hexdigest()

    def remarks(self) -> list[str]:
        """Return what the images are."""
        first = self._items.first
        channels, height, width = first.shape
        what = "pixels" if first.dtype == torch.uint8 else "values of x_0"
        several = counted(channels, "channel")
        return [f"  sizes    {width} x {height} {what} in {several}, of {self._name}"]

    def val_dataloader(self) -> Any:
        """Return the held-out images or those of the second data set in one order, if any."""
        if self._validation is None:
            return super().val_dataloader()
        world = self.trainer.world_size if self.trainer else 1
        there = np.arange(len(self._validation))
        batches = validation_batches(there, max(1, self.batch_size // world), self.rank, world)
        return self._loader(batches, self._validation)

    def setup(self, stage: str) -> None:
        """Tell the user's module of its trainer; it was set up before."""
        if self.module is not None:
            self.module.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        """Let the user's module end its work."""
        if self.module is not None:
            self.module.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Let the user's module see what has ended its training."""
        if self.module is not None:
            self.module.on_exception(exception)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the user's module change a batch where it now is, seeded by its step."""
        if not self._items.steps:
            return batch
        images, labels, step = batch
        bits = int(
            generator(self.seed, step, len(self._items) + 1 + self.rank, ITEM).integers(2**63)
        )
        torch.manual_seed(bits)
        assert self.module is not None
        return self.module.on_after_batch_transfer((images, labels), dataloader_idx)

    def check(self, model: Model) -> None:
        """Check that a model can be trained on these images.

        Raises:
            ValueError: size, channels, range or number of classes do not fit.
        """
        # Pixels have to be of the model's resolution, x_0 of its shape.
        first, shape = self._items.first, model.denoiser.latent_shape
        channels, height, width = shape
        found, factor = tuple(first.shape), model.codec.factor
        latent = isinstance(model.codec, VAECodec)
        pixels = first.dtype == torch.uint8
        wanted = (height * factor, width * factor) if pixels else (height, width)
        last = found[-1] in CHANNELS and found[0] not in CHANNELS
        if last and found[1:] != wanted:
            raise ValueError(
                f"{self._name} has images of shape {found}: expected (c, h, w), channels first; "
                f"permute them, a tensor by .permute(2, 0, 1), an array by .transpose(2, 0, 1)"
            )
        if found[0] not in MODES and (pixels or not latent):
            raise ValueError(
                f"{self._name} has images of {counted(found[0], 'channel')}: expected 1 (grey) or "
                f"3 (colour), or latents as floats beside vae=FOLDER, their autoencoder; of RGBA "
                f"take the first three"
            )
        if pixels:
            if found[1:] != wanted:
                raise ValueError(
                    f"{self._name} has images of {found[1]} x {found[2]} pixels: expected "
                    f"{wanted[0]} x {wanted[1]}, the resolution of the model; set resolution, or "
                    f"crop them"
                )
            if not latent and found[0] != channels:
                raise ValueError(
                    f"{self._name} has {found[0]} channels, the model {channels}: expected as many"
                )
        else:
            if found != shape:
                raise ValueError(
                    f"{self._name} has x_0 of shape {found}: expected {shape}, that of the model"
                )
            if not latent:
                self._check_range()
        self.check_classes(model)

    def _check_range(self) -> None:
        """Refuse floats that are no pixels from -1 to 1.

        Raises:
            ValueError: values beyond, or from 0 to 1, as torchvision's ToTensor makes them.
        """
        some = list(range(min(LOOKED_AT, len(self._items))))
        images = self._items.__getitems__(Batch(0, some, [False] * len(some)))[0]
        least, most = images.min().item(), images.max().item()
        if least < -1 or most > 1 or (least >= 0 and most > 0):
            raise ValueError(
                f"{self._name} has images of floats from {least:.3g} to {most:.3g}: expected uint8 "
                f"pixels (leave ToTensor out, or take PILToTensor), or x_0 from -1 to 1"
            )


def told_by(things: Iterable[Any], *names: str) -> Any:
    """Return what one of several things says under one of several names, else None."""
    for thing in things:
        for name in names:
            found = getattr(thing, name, None)
            if found is not None and not callable(found):
                return found
    return None


def told_labels(items: Items, *things: Any) -> Indices | None:
    """Return the labels that a data set tells, or its module, None where they tell none.

    Raises:
        ValueError: they are not a whole number for each image, 0 or more.
    """
    told = told_by(things, "labels", "targets")
    if told is None:
        return None
    count, whose = len(items), f"{items.name}: its labels"
    try:
        found = np.asarray(told.cpu() if isinstance(told, Tensor) else told)
    except ValueError:  # Of several lengths.
        found = np.empty(0, dtype=object)
    if found.shape != (count,):
        what = f"{found.dtype} {found.shape}" if found.size else f"a {type(told).__name__}"
        raise ValueError(
            f"{whose} are {what}: expected {count} whole numbers, 0 or more, one for each image"
        )
    for index, label in enumerate(found.tolist()):
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(
                f"{whose} say {_in_a_line(label)} for item {index}: expected a whole number, 0 or "
                f"more"
            )
    return found.astype(np.int64)


def overridden(module: LightningDataModule, hook: str) -> bool:
    """Whether a module has a hook of its own."""
    return getattr(type(module), hook) is not getattr(LightningDataModule, hook)


def map_loader(loader: Any, name: str) -> DataLoader[Any]:
    """Return a loader whose data set can be put in the order of seed and step.

    Raises:
        ValueError: there is none or are several, it streams, or its order is its own.
    """
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"{name} returns a {type(loader).__name__}: expected one DataLoader; of several data "
            f"sets make one by torch.utils.data.ConcatDataset"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{name} streams its items: expected a data set with a length and items by number, so "
            f"that a run can go on where it stopped; tar shards can be read as data=folder "
            f"data.root=SHARDS"
        )
    plain = loader.batch_size is not None
    if not plain or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        what = loader.sampler if plain else loader.batch_sampler
        raise ValueError(
            f"{name} has a {type(what).__name__}, whose order would be lost: batches follow the "
            f"seed and the step here; leave it out, and take data.balance=1 for classes alike"
        )
    if loader.worker_init_fn is not None:
        raise ValueError(
            f"{name} has a worker_init_fn, which is not called here: leave it out; what is drawn "
            f"at random is seeded for each image, and a file is opened at the first item"
        )
    return loader


def own_collate(loader: DataLoader[Any]) -> Callable[[list[Any]], Any] | None:
    """Return how a loader makes a batch of items, None where it stacks them."""
    return None if loader.collate_fn is default_collate else loader.collate_fn
