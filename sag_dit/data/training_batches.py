"""Training data whose batches are a pure function of (seed, step): which images, which mirrored."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from sag_dit.messages import SHOWN, counted, readable, some
from sag_dit.noise import generator

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model

SHUFFLE = 2
"""Purpose of the random streams that order the data, see :func:`sag_dit.noise.generator`."""

TURNS = 11
"""Purpose of the random streams that order an epoch's buckets."""

FLIP = 8
"""Purpose of the random streams that mirror images, see :func:`sag_dit.noise.generator`."""

VALIDATION = 2**62
"""The step of the first validation batch, out of reach of training."""

MOST_WORKERS = 8
HASH_RANGE = 2**63

Indices = NDArray[np.int64]


class Batch(NamedTuple):
    """What a step asks of a dataset's ``__getitems__``.

    Example:
        >>> Batch(step=0, indices=[4, 2], mirrored=[False, True]).indices
        [4, 2]
    """

    step: int
    indices: list[int]
    mirrored: list[bool]


class TrainingBatches(Sampler[Batch]):
    """The endless batches of one rank, from the step on that ``first`` tells at each start.

    The chosen images form one endless sequence of shuffled epochs. Step s on w ranks takes the w *
    batch_size images from place s * w * batch_size on, and each rank takes a contiguous part of
    them. So a batch depends on (seed, step) alone: not on workers, and not on where a run was
    resumed.

    With ``buckets``, the bucket of each of the chosen images, every bucket is such a sequence, and
    the images of a step are of one bucket, on all ranks the same. After e epochs of the whole,
    bucket b of n_b images has had floor(e n_b / (w batch_size)) steps, so its share is right to a
    batch. In which order an epoch's buckets take their turns is drawn at random.

    Which images are mirrored is drawn for the batch of all ranks together. So it does not depend on
    how many ranks share the batch.

    Example:
        >>> batches = TrainingBatches(np.arange(10), 4, seed=0, flip=False)
        >>> batches.batch(7) == batches.batch(7)
        True
    """

    def __init__(
        self,
        chosen: Indices,
        batch_size: int,
        seed: int,
        *,
        flip: bool,
        first: Callable[[], int] = int,
        rank: int = 0,
        world: int = 1,
        buckets: Indices | None = None,
    ) -> None:
        self._batch_size, self._seed, self._flip = batch_size, seed, flip
        self._first, self._rank, self._world = first, rank, world
        # The images of each bucket, those without any in its place left out.
        of = np.zeros(len(chosen), dtype=np.int64) if buckets is None else buckets
        self._buckets = [chosen[of == bucket] for bucket in np.unique(of)]
        self._counts = np.array([len(each) for each in self._buckets], dtype=np.int64)
        self._shuffled: dict[int, tuple[int, Indices]] = {}
        self._turns: tuple[int, Indices] | None = None

    def order(self, epoch: int, bucket: int = 0) -> Indices:
        """Return the order of a bucket's images in one epoch of its own."""
        known = self._shuffled.get(bucket)
        if known is None or known[0] != epoch:
            stream = generator(self._seed, epoch, bucket, SHUFFLE)
            known = self._shuffled[bucket] = (epoch, stream.permutation(self._counts[bucket]))
        return known[1]

    def _steps_before(self, epoch: int) -> Indices:
        """Return how many steps each bucket has had before an epoch: floor(e n_b / batch)."""
        return epoch * self._counts // (self._batch_size * self._world)

    def place(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many steps that bucket has had before."""
        if len(self._buckets) == 1:
            return 0, step
        # The epoch, by halving: the last one before which there are no more steps than this.
        batch, images = self._batch_size * self._world, int(self._counts.sum())
        first, last = 0, (step + len(self._buckets) + 1) * batch // images + 1
        while last - first > 1:
            middle = (first + last) // 2
            if int(self._steps_before(middle).sum()) <= step:
                first = middle
            else:
                last = middle
        # The turns of its buckets.
        before = self._steps_before(first)
        if self._turns is None or self._turns[0] != first:
            each = self._steps_before(first + 1) - before
            turns = np.repeat(np.arange(len(each)), each)
            self._turns = (first, generator(self._seed, first, 0, TURNS).permutation(turns))
        turns, turn = self._turns[1], step - int(before.sum())
        bucket = int(turns[turn])
        return bucket, int(before[bucket] + np.count_nonzero(turns[:turn] == bucket))

    def batch(self, step: int) -> Batch:
        """Return this rank's part of one step."""
        # The places, which may run on into the bucket's next epochs.
        size = self._batch_size
        bucket, number = self.place(step)
        images = self._buckets[bucket]
        epoch, offset = divmod((number * self._world + self._rank) * size, len(images))
        places = self.order(epoch, bucket)[offset : offset + size]
        while len(places) < size:
            epoch += 1
            places = np.concatenate([places, self.order(epoch, bucket)[: size - len(places)]])
        # This rank's coins.
        mirrored = [False] * size
        if self._flip:
            coins = generator(self._seed, step, 0, FLIP).random(size * self._world) < 0.5
            mirrored = coins[self._rank * size : (self._rank + 1) * size].tolist()
        return Batch(step, images[places].tolist(), mirrored)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, count(self._first()))


def validation_batches(
    chosen: Indices,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    buckets: Indices | None = None,
) -> list[Batch]:
    """Return one rank's share of held-out images in order, none mirrored.

    All ranks get the same number of batches, since ranks that reduce a metric together would
    otherwise wait for ever. Where the count is no multiple of the ranks the first images are
    repeated. With ``buckets``, the bucket of each image, all this holds of each bucket.
    """
    of = np.zeros(len(chosen), dtype=np.int64) if buckets is None else buckets
    parts: list[list[int]] = []
    for bucket in np.unique(of):
        images = chosen[of == bucket]
        each = -(-len(images) // world)
        share = images[(np.arange(each) * world + rank) % len(images)].tolist()
        parts += [share[start : start + batch_size] for start in range(0, each, batch_size)]
    return [
        Batch(VALIDATION + number, part, [False] * len(part)) for number, part in enumerate(parts)
    ]


def name_hash(name: str) -> int:
    """Return 63 bits of a file's name relative to the data's root."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def held_out(hashes: Indices, labels: Indices, share: float) -> NDArray[np.bool_]:
    """Choose the images to hold out: those with the lowest hashes, ``share`` of their range.

    So an image stays on its side when others are added. Every class keeps at least one image to
    train on, and at least one image is held out unless ``share`` is 0.

    Raises:
        ValueError: no class has an image to spare.
    """
    chosen: NDArray[np.bool_] = hashes < share * HASH_RANGE
    if share == 0:
        return chosen
    # Of each class the image of the highest hash stays to train on.
    order = np.lexsort((hashes, labels))
    last_of_class = np.append(labels[order][1:] != labels[order][:-1], True)
    kept = np.zeros(len(labels), dtype=np.bool_)
    kept[order[last_of_class]] = True
    chosen &= ~kept
    # Where none was chosen, take the one of the lowest hash that its class can spare.
    if not chosen.any():
        spare = np.flatnonzero(~kept)
        if not len(spare):
            raise ValueError(
                f"held_out={share}: no class has more than one image; expected 0, or more images"
            )
        chosen[spare[np.argmin(hashes[spare])]] = True
    return chosen


def workers_per_process(processes: int = 1) -> int:
    """Return the number of loader processes for each of several processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_WORKERS, (cores or 1) // processes))


def as_it_is(batch: Any) -> Any:
    """Collate nothing: ``__getitems__`` returns whole batches."""
    return batch


def with_checked_labels(batch: Any, whose: str, classes: int) -> Any:
    """Return a batch as it is, once its labels are looked at.

    Raises:
        ValueError: they are not one whole number for each image, from 0 to ``classes`` - 1.

    Example:
        >>> with_checked_labels((torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), "Discs", 2)[1]
        tensor([0, 1])
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) > 1
    labels = batch[1] if pair else None
    if not isinstance(labels, torch.Tensor):
        what = "no labels" if labels is None else f"labels that are a {type(labels).__name__}"
        raise ValueError(f"{whose}: a batch has {what}: expected (images, labels), two tensors")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != (len(batch[0]),):
        raise ValueError(
            f"{whose}: a batch of {len(batch[0])} images has labels {labels.dtype} "
            f"{tuple(labels.shape)}: expected a whole number for each image"
        )
    strange = ((labels < 0) | (labels >= classes)).nonzero()
    if len(strange):
        place = int(strange[0])
        raise ValueError(
            f"{whose}: image {place} of a batch is of class {int(labels[place])}, and the data has "
            f"{counted(classes, 'class', 'classes')}: expected 0 to {classes - 1}"
        )
    return batch


def outlive_signals(_: int) -> None:
    """Let a loader's process go on where its whole group is told to stop: its batch is awaited.

    Who has started it ends it. A second SIGTERM does too, so that it can be ended where it hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_the_next)


def _end_at_the_next(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def explained(failure: Exception) -> Exception:
    """Return why a loader has failed: in a sentence, if it was in a process of its own."""
    if not isinstance(failure, (ValueError, OSError, RuntimeError)):
        return failure
    # torch puts the traceback of the loader's process before what was raised there.
    text = str(failure)
    if caught := re.match(r"Caught (\w+) in DataLoader worker", text):
        text = re.split(rf"\n(?:[\w.]+\.)?{caught[1]}: ", text)[-1].strip()
    elif "DataLoader worker" in text:
        text = (
            "a process that reads data was killed, often for want of memory; data.workers=N "
            "takes fewer of them"
        )
    else:
        return failure
    return ValueError(text)


class TrainingLoader(DataLoader[Any]):
    """Gives training batches; once it cannot, it says so and repeats the last one.

    Training looks for a ``failure`` after each batch and ends there, all ranks together. It is
    always one batch ahead, since Lightning fetches one before it is needed where there is no end,
    so what stands in for a batch is never trained on.

    Example::

        loader = TrainingLoader(dataset, batch_sampler=batches)
        for images, labels in loader:
            if loader.failure is not None:
                break
    """

    failure: Exception | None = None
    """Why there are no more batches."""

    def __iter__(self) -> Any:
        batch, batches = None, super().__iter__()
        while True:
            try:
                batch = next(batches) if self.failure is None else batch
            except StopIteration:
                return
            except Exception as error:
                self.failure = explained(error)
                if batch is None:
                    raise self.failure from error
            yield batch


class StepData(LightningDataModule, ABC):
    """Training and validation batches of an indexed dataset.

    ``batch_size`` counts the images of a step over all ranks. ``workers`` are loader processes per
    rank, None for what suits the machine; batches do not depend on them.

    Attributes:
        class_names: one per class.
        channels: of an image or latent.
        vae: the autoencoder of latents, None for images.

    Raises:
        ValueError: a value out of its range.

    Example::

        class Discs(StepData):
            key, class_names, channels = "discs", ("small", "large"), 1

            def __init__(self, count=200, batch_size=16):
                super().__init__(batch_size=batch_size, seed=0, flip=False, workers=0)
                self.count = count

            @property
            def dataset(self):
                return disc_images(self.count)  # has __getitems__(batch)

            @property
            def held_out_images(self):
                return np.arange(self.count) % 10 == 0
    """

    class_names: tuple[str, ...]
    channels: int
    vae: str | dict[str, Any] | None = None

    def __init__(self, *, batch_size: int, seed: int, flip: bool, workers: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more images")
        if workers is not None and workers < 0:
            raise ValueError(f"workers={workers}: expected 0 or more processes, or null")
        self.batch_size, self.seed, self.flip, self.workers = batch_size, seed, flip, workers

    @property
    @abstractmethod
    def dataset(self) -> Dataset[Any]:
        """What serves a :class:`Batch`.

        Its ``__getitems__`` returns uint8 images (b, c, h, w) and labels (b).
        """

    @property
    @abstractmethod
    def held_out_images(self) -> NDArray[np.bool_]:
        """Which images are held out."""

    def check(self, model: Model) -> None:
        """Refuse a model that does not draw such images of as many classes.

        Raises:
            ValueError: what does not fit.
        """
        channels = model.denoiser.latent_shape[0]
        if channels != self.channels:
            raise ValueError(f"the data has {self.channels} channels and the model {channels}")
        self.check_classes(model)

    def check_classes(self, model: Model) -> None:
        """Check that a model has as many classes as the data.

        Raises:
            ValueError: it has not.
        """
        found, expected = len(self.class_names), model.class_conditional.num_classes
        if found != expected:
            raise ValueError(
                f"the data has {counted(found, 'class', 'classes')} and the model {expected}: "
                f"expected as many; set the model's num_classes to {found}"
                f"{self.image_beyond(expected)}"
            )

    def image_beyond(self, classes: int) -> str:
        """Return what names an image whose label is beyond so many classes, to end a sentence."""
        return ""

    @property
    def training_images(self) -> Indices:
        """The images of an epoch."""
        return np.flatnonzero(~self.held_out_images)

    def buckets_of(self, images: Indices) -> Indices | None:
        """Return the bucket of each of some images, None where all images have one shape.

        The images of a batch are of one bucket.
        """
        return None

    @property
    def gives_pixels(self) -> bool:
        """Whether batches hold the images themselves, for objectives that see pixels."""
        return self.vae is None

    def fingerprint(self) -> dict[str, Any] | None:
        """Return what tells that the data has changed: ``images``, ``classes``, ``sha256``.

        ``classes`` are the images of each class by its name. None where data cannot change.
        """
        return None

    def report(self) -> str:
        """Return in a few lines what there is to train on, and what of it looks like a mistake."""
        there, held_out = len(self.held_out_images), int(self.held_out_images.sum())
        count, epoch = there - held_out, len(self.training_images)
        classes = counted(len(self.class_names), "class", "classes")
        parts = f": {count:,} to train on, {held_out:,} held out" if held_out else ""
        if self.other_images:
            parts += f", and {counted(self.other_images, 'other')} to validate with"
        lines = [f"data: {counted(there, 'image')} in {classes}{parts}"]
        if epoch != count:
            again = "those of small classes several times"
            lines.append(f"  epoch    {counted(epoch, 'image')}, {again}")
        lines += self.details()
        if not self.validates:
            lines.append("  note: no images are held out: val/loss is not computed")
        return "\n".join(lines)

    @property
    def validates(self) -> bool:
        """Whether there are images to validate with."""
        return self.val_dataloader() not in (None, [])

    @property
    def other_images(self) -> int:
        """How many images there are to validate with that are none of these."""
        return 0

    def details(self) -> list[str]:
        """Return further lines of the report."""
        return []

    @property
    def called(self) -> str:
        """What messages call the data."""
        return type(self).__name__

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return self.trainer.global_rank if self.trainer else 0

    def rank_batch_size(self, world: int) -> int:
        """Return how many images of a step one of ``world`` ranks has.

        Raises:
            ValueError: the ranks cannot share the batch equally, or it exceeds the images.
        """
        size, there = self.batch_size, len(self.training_images)
        if size % world:
            raise ValueError(
                f"data.batch_size={size} on {world} ranks: expected a multiple of {world}, such as "
                f"{-(-size // world) * world}"
            )
        if size > there:
            raise ValueError(
                f"data.batch_size={size}: expected from 1 to {there}, the number of images "
                f"to train on"
            )
        return size // world

    def train_dataloader(self) -> DataLoader[Any]:
        """Return endless training batches, going on at the trainer's step.

        Also after an "epoch" that ``limit_train_batches`` ends; ``overfit_batches`` begins anew.
        """
        world = self.trainer.world_size if self.trainer else 1
        images = self.training_images
        return self._loader(
            TrainingBatches(
                images,
                self.rank_batch_size(world),
                self.seed,
                flip=self.flip,
                first=self._first_batch,
                rank=self.rank,
                world=world,
                buckets=self.buckets_of(images),
            )
        )

    def _first_batch(self) -> int:
        if self.trainer is None:
            return 0
        done, few = self.trainer.fit_loop.total_batch_idx + 1, int(self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return done % few if few else done

    def val_dataloader(self) -> Any:
        """Return the held-out images in one order, or no loader if none are held out."""
        world = self.trainer.world_size if self.trainer else 1
        chosen = np.flatnonzero(self.held_out_images)
        if not len(chosen):
            return []
        batch_size = max(1, self.batch_size // world)
        buckets = self.buckets_of(chosen)
        return self._loader(validation_batches(chosen, batch_size, self.rank, world, buckets))

    def _loader(
        self, batches: TrainingBatches | list[Batch], dataset: Dataset[Any] | None = None
    ) -> DataLoader[Any]:
        workers = self.workers
        if workers is None:
            workers = workers_per_process(self.trainer.num_devices if self.trainer else 1)
        kind = TrainingLoader if isinstance(batches, TrainingBatches) else DataLoader
        return kind(
            self.dataset if dataset is None else dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=partial(
                with_checked_labels, whose=self.called, classes=len(self.class_names)
            ),
            num_workers=workers,
            worker_init_fn=outlive_signals,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class NamedData(StepData):
    """Images with names, of which ``held_out``, a share, is kept for validation.

    Example::

        data = ImageFolderData("photos/", held_out=0.1)  # one of its subclasses
        print(data.held_out_images.sum())
    """

    def __init__(
        self, *, batch_size: int, seed: int, flip: bool, held_out: float, workers: int | None
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, flip=flip, workers=workers)
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out}: expected a share of the images from 0 up to 1")
        self.held_out = held_out

    @property
    @abstractmethod
    def labels(self) -> Indices:
        """The class of every image."""

    @property
    @abstractmethod
    def name_hashes(self) -> Indices:
        """:func:`name_hash` of every image."""

    def named(self, index: int) -> str:
        """Return what messages call an image."""
        return f"image {index}"

    def image_beyond(self, classes: int) -> str:
        """Return what names an image whose label is beyond so many classes, to end a sentence."""
        strange = np.flatnonzero(self.labels >= classes)[:1].tolist()
        told = [f"; {self.named(index)} is of class {self.labels[index]}" for index in strange]
        return "".join(told)

    def details(self) -> list[str]:
        """Return the images of each class, remarks, and classes that look like mistakes."""
        counts = self.class_counts
        first = [f"{readable(name)} ({count:,})" for name, count in list(counts.items())[:SHOWN]]
        if len(counts) > SHOWN:
            fewest, most = min(counts.values()), max(counts.values())
            each = f"{fewest:,} to {counted(most, 'image')}"
            first.append(f"... of {counted(most, 'image') if fewest == most else each} each")
        lines = [f"  classes  {', '.join(first)}", *self.remarks()]
        single = [name for name, count in counts.items() if count == 1]
        if single:
            have = "1 class has" if len(single) == 1 else f"{len(single):,} classes have"
            lines.append(f"  warning: {have} a single image: {some(single)}")
        empty = [name for name, count in counts.items() if count == 0]
        if empty:
            have = "1 class has" if len(empty) == 1 else f"{len(empty):,} classes have"
            lines.append(f"  warning: {have} no image: {some(empty)}")
        return lines

    def remarks(self) -> list[str]:
        """Return what a subclass has to tell in the report."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells that the data has changed, see :meth:`StepData.fingerprint`."""
        counts = self.class_counts
        return {"images": sum(counts.values()), "classes": counts, "sha256": self.listing_sha256()}

    def listing_sha256(self) -> str:
        """Return a sha256 of the files' names and, where a subclass knows it, of their contents."""
        return hashlib.sha256(np.sort(self.name_hashes).tobytes()).hexdigest()

    @property
    def class_counts(self) -> dict[str, int]:
        """How many images each class has."""
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, counts, strict=True))

    @cached_property
    def held_out_images(self) -> NDArray[np.bool_]:
        """Which images are held out, by their names."""
        if self.held_out == 0:
            return np.zeros(len(self.labels), dtype=np.bool_)
        return held_out(self.name_hashes, self.labels, self.held_out)


def balanced(chosen: Indices, labels: Indices, balance: float) -> Indices:
    """Repeat the images of small classes: round((n_max / n)^balance) times in a class of n.

    n_max is the size of the largest class: with 0 every image comes once, with 1 all classes are
    about equally frequent.

    Raises:
        ValueError: ``balance`` is not from 0 to 1.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance={balance}: expected 0 (every image once) to 1 (classes alike)")
    if balance == 0:
        return chosen
    counts = np.bincount(labels[chosen])
    times = np.rint((counts.max() / np.maximum(counts, 1)) ** balance).astype(np.int64)
    return np.repeat(chosen, times[labels[chosen]])
