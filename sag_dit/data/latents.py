"""Latents to train on: encoded once, drawn from their posterior afresh at every step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sag_dit.checkpoints import Model
from sag_dit.codec import Pixels, VAECodec, encoder_of, hash_tensors
from sag_dit.data.crop import sides
from sag_dit.data.images import (
    Crops,
    check_buckets,
    find_images,
    listing_sha256,
    told_buckets,
)
from sag_dit.data.npy_latents import NpyLatents, holds_npy
from sag_dit.data.shards import REMEDY, Index, Rows, map_shard, read_index, verify
from sag_dit.data.training_batches import (
    Batch,
    Indices,
    NamedData,
    as_it_is,
    balanced,
    name_hash,
    validation_batches,
)
from sag_dit.messages import counted, some
from sag_dit.noise import generator
from sag_dit.tensors import Images, Labels

POSTERIOR = 9
"""Purpose of the random streams of posterior samples, see :func:`sag_dit.noise.generator`."""

Moments = Float[Tensor, "b 2 c h w"]


def encoder_sha256(codec: VAECodec) -> str:
    """Return a hash of the weights that encode; decoders may differ between autoencoders."""
    return hash_tensors(encoder_of(codec))


class Latents(Dataset[tuple[Moments, Labels, int]]):
    """Mean and standard deviation of x_0 by index, mapped from a folder's shards.

    Raises:
        ValueError: a shard is missing, truncated, or not what the index says.

    Example::

        latents = Latents(folder, read_index(folder))
        moments, label, step = latents[0]
    """

    def __init__(self, folder: Path, index: Index, images: str | Path | None = None) -> None:
        self.folder, self.index = folder, index
        self._mapped: list[Rows] | None = None
        self._ends = np.cumsum([shard.rows for shard in index.shards])
        rows = self._shards
        self.labels: Indices = np.concatenate([part.labels for part in rows])
        self.names: Indices = np.concatenate([part.names for part in rows])
        strange = (self.labels < 0) | (self.labels >= len(index.class_names))
        if strange.any():
            first = int(strange.argmax())
            raise ValueError(
                f"{self.named(first)} is of class {self.labels[first]}, and the data has "
                f"{counted(len(index.class_names), 'class', 'classes')}; {REMEDY}"
            )
        self._crops = None if images is None else _encoded_images(folder, index, images)
        if self._crops is not None:
            hashes = np.array([*map(name_hash, self._crops.files.names)])
            order = np.argsort(hashes)
            self._image = order[np.searchsorted(hashes, self.names, sorter=order)]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The sizes (height, width) of the images, in pixels; none where nothing states buckets."""
        return [(height, width) for height, width in self.index.config.get("buckets") or ()]

    @cached_property
    def bucket_of(self) -> Indices | None:
        """The bucket of each image, None where all have one size.

        Raises:
            ValueError: a shard's shape is that of none.
        """
        if len(self.buckets) < 2:
            return None
        (channels, height, _), shards = self.index.shape, self.index.shards
        factor = sides(self.index.config["size"])[0] // height
        shapes = [(channels, high // factor, wide // factor) for high, wide in self.buckets]
        strange = [each.file for each in shards if self.index.shape_of(each) not in shapes]
        if strange:
            raise ValueError(f"{self.folder / strange[0]}: of the shape of no bucket; {REMEDY}")
        of = [shapes.index(self.index.shape_of(shard)) for shard in shards]
        return np.repeat(of, [shard.rows for shard in shards])

    @property
    def _shards(self) -> list[Rows]:
        if self._mapped is None:
            self._mapped = [
                map_shard(self.folder, shard, self.index) for shard in self.index.shards
            ]
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # Without the mapped files, or they would be copied into every spawned loader process, which
        # can map them itself.
        return {**self.__dict__, "_mapped": None}

    def __len__(self) -> int:
        return len(self.labels)

    def named(self, index: int) -> str:
        """Return the file of an image, and its place there."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.index.shards[place]
        return f"{self.folder / shard.file}: row {index - int(self._ends[place]) + shard.rows}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        moments, labels, step, *_ = self.__getitems__(Batch(0, [index], [False]))
        return moments[0], labels[0], step

    def _pixels(self, batch: Batch) -> Pixels:
        """Return the images that the latents of a batch were encoded from, mirrored as these."""
        assert self._crops is not None
        pixels = []
        for index, mirrored in zip(batch.indices, batch.mirrored, strict=True):
            crop = self._crops.read(int(self._image[index]))
            assert crop is not None  # which strict makes an error
            image = torch.from_numpy(crop)
            pixels.append(image.flip(-1) if mirrored else image)
        return torch.stack(pixels)

    def __getitems__(self, batch: Batch) -> tuple[Any, ...]:
        shards = self._shards
        places = np.searchsorted(self._ends, batch.indices, side="right")
        rows = np.asarray(batch.indices) - self._ends[places]  # from the end of each shard
        shape = shards[places[0]].moments.shape[2:]
        moments = np.empty((len(batch.indices), *shape), dtype=shards[0].moments.dtype)
        for out, (shard, row, mirrored) in enumerate(
            zip(places.tolist(), rows.tolist(), batch.mirrored, strict=True)
        ):
            moments[out] = shards[shard].moments[row, 1 if mirrored else 0]
        labels = torch.from_numpy(self.labels[batch.indices])
        pixels = () if self._crops is None else (self._pixels(batch),)
        return torch.from_numpy(moments), labels, batch.step, *pixels


def _encoded_images(folder: Path, index: Index, images: str | Path) -> Crops:
    """Return the images that latents were encoded from, cropped as they were then.

    Raises:
        ValueError: the folder holds other images.
    """
    told, files = index.config, find_images(images)
    if listing_sha256(files) != told.get("images_sha256"):
        raise ValueError(
            f"data.images={images}: {len(files):,} images that are not the {told.get('images')} "
            f"that {folder} was encoded from; expected their folder as it was then"
        )
    return Crops(
        files,
        told["size"],
        upright=told["upright"],
        background=told.get("background"),
        strict=True,
        buckets=[(height, width) for height, width in told.get("buckets") or ()],
    )


def sample_posterior(moments: Moments, seed: int, step: int, rank: int) -> Images:
    """Return x_0 = mean + std z in float32; z depends on (seed, step, rank) alone."""
    bits = generator(seed, step, rank, POSTERIOR).integers(2**63)
    source = torch.Generator(device=moments.device).manual_seed(int(bits))
    mean, std = moments.float().unbind(dim=1)
    z = torch.randn(mean.shape, generator=source, device=mean.device)
    return torch.addcmul(mean, std, z)


def open_latents(root: Path, images: str | Path | None = None) -> Latents | NpyLatents:
    """Return the latents of a folder that ``encode.py`` wrote, or of EDM2's dataset_tool.py.

    Raises:
        ValueError: they are incomplete or damaged, or not those of ``images``.
    """
    if not holds_npy(root):
        return Latents(root, read_index(root), images)
    if images is not None:
        raise ValueError(
            f"data.images={images}: latents of EDM2 do not tell which images they are of: expected "
            f"null, or latents of encode.py"
        )
    return NpyLatents(root)


def _second(folder: Path, first: Index) -> Latents | NpyLatents:
    """Return the latents to validate with.

    Raises:
        ValueError: they are not of the classes and the autoencoder of those to train on.
    """
    second = open_latents(folder.expanduser())
    encoder = "encoder_sha256"
    here = (first.class_names, first.shape, first.config.get(encoder))
    if (second.index.class_names, second.index.shape, second.index.config.get(encoder)) != here:
        raise ValueError(
            f"data.validation={folder}: expected latents of the same classes, shape and "
            f"autoencoder as those of data.root"
        )
    return second


def _check_sizes(where: str, latents: Latents | NpyLatents, model: Model) -> None:
    """Refuse latents of several sizes that a network cannot be given; ``where`` they are.

    Raises:
        ValueError: it takes one size, or patches that do not divide another one.
    """
    if latents.bucket_of is None:
        return
    network = model.class_conditional.network
    if model.denoiser.size_multiple is None:
        raise ValueError(
            f"{where} holds latents of several sizes, and {type(network).__name__} takes one: "
            f"expected latents of encode.py without data.buckets, or a network that says "
            f"any_size = True"
        )
    check_buckets(latents.buckets, latents.buckets, model.codec.factor, network.patch_size)


class LatentData(NamedData):
    """Batches (x_0 (b, c, h, w) float32, labels) of latents that ``encode.py`` or EDM2 wrote.

    ``root`` is a folder of the first, or a zip or folder of .npy files of NVlabs/edm2's
    dataset_tool.py. Those hold z as the encoder put it out, and the statistics of the model's
    autoencoder make x_0 of it, by default those of :class:`sag_dit.checkpoints.EDM2Autoencoder`.

    Loader processes only copy means and standard deviations. x_0 is drawn from them on the model's
    device, since drawing takes far longer than copying. ``flip`` takes an image or its mirror image
    with probability 1/2; None does so if mirror images were encoded. ``verify`` compares every
    shard's sha256 before the first step. ``balance`` repeats the images of small classes, see
    :func:`balanced`. ``validation`` is a second folder, to validate with. ``images`` is the folder
    that was encoded: batches then hold its crops too, as uint8 (b, 3, size, size) behind the
    labels, for an objective that sees pixels.

    Raises:
        ValueError: the folder is incomplete or damaged, or a value is out of its range.

    Example::

        trainer.fit(module, LatentData("outputs/latents/photos-1f3a", batch_size=256))
    """

    key = "latents"
    former = ("sag_dit.data.latents.LatentData",)
    later: ClassVar[Mapping[str, object]] = {"balance": 0.0, "validation": None, "images": None}

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        seed: int = 0,
        *,
        flip: bool | None = None,
        held_out: float = 0.0,
        verify: bool = True,
        workers: int | None = 1,
        balance: float = 0.0,
        validation: str | Path | None = None,
        images: str | Path | None = None,
    ) -> None:
        # What the folder holds, and what to validate with: a share of it, or a second folder.
        folder = Path(root).expanduser()
        self._raw = open_latents(folder, images) if holds_npy(folder) else None
        self.index = read_index(folder) if self._raw is None else self._raw.index
        if validation is not None and held_out:
            raise ValueError(
                f"held_out={held_out} and validation={validation}: expected one of them; either a "
                f"share of the images or a folder of others"
            )
        if validation is not None and images is not None:
            raise ValueError(
                f"validation={validation} and images={images}: the images are those of one folder "
                f"of latents; expected held_out in the place of validation"
            )
        self.images = images
        self._validation = None if validation is None else _second(Path(validation), self.index)
        # Mirror images can be drawn only where they were encoded.
        self.balance = balance
        if flip and self.index.flips == 1:
            raise ValueError(
                f"flip=true: {root} holds no mirror images; expected flip=false, or latents "
                f"encoded with flip=true"
            )
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            flip=self.index.flips == 2 if flip is None else flip,
            held_out=held_out,
            workers=workers,
        )
        # What the model to be trained has to fit.
        self._folder, self._verify = folder, verify
        self.class_names = self.index.class_names
        self.channels, self.vae = self.index.shape[0], self.index.vae

    @cached_property
    def dataset(self) -> Latents | NpyLatents:
        """The latents."""
        return self._raw or Latents(self._folder, self.index, self.images)

    @property
    def gives_pixels(self) -> bool:
        """Whether the images that were encoded are read too."""
        return self.images is not None

    @property
    def labels(self) -> Indices:
        """The class of every image."""
        return self.dataset.labels

    def named(self, index: int) -> str:
        """Return the file of an image, and its place there if there are several in it."""
        return self.dataset.named(index)

    @property
    def other_images(self) -> int:
        """How many images the second folder has."""
        return 0 if self._validation is None else len(self._validation)

    @property
    def name_hashes(self) -> Indices:
        """The hash of every image's name."""
        return self.dataset.names

    @cached_property
    def training_images(self) -> Indices:
        """The images of an epoch, those of small classes repeated."""
        return balanced(super().training_images, self.labels, self.balance)

    def val_dataloader(self) -> Any:
        """Return the held-out latents or those of the second folder in one order, if any."""
        if self._validation is None:
            return super().val_dataloader()
        world = self.trainer.world_size if self.trainer else 1
        there, size = np.arange(len(self._validation)), max(1, self.batch_size // world)
        buckets = self._validation.bucket_of
        batches: Any = validation_batches(there, size, self.rank, world, buckets)
        return DataLoader(self._validation, batch_sampler=batches, collate_fn=as_it_is)

    def buckets_of(self, images: Indices) -> Indices | None:
        """Return the bucket of each of some images, None where all have one size."""
        bucket_of = self.dataset.bucket_of
        return None if bucket_of is None else bucket_of[images]

    def listing_sha256(self) -> str:
        """Return the sha256 of the shards' names and contents, as the index says.

        Of .npy files, of their names, sizes and labels.
        """
        if isinstance(self.dataset, NpyLatents):
            return self.dataset.listing_sha256()
        listing = "".join(f"{shard.file} {shard.sha256}\n" for shard in self.index.shards)
        return hashlib.sha256(listing.encode()).hexdigest()

    def remarks(self) -> list[str]:
        """Return what was left out when the images were encoded."""
        skipped = [name for shard in self.index.shards for name in shard.skipped]
        text = f"  left out {len(skipped):,} (could not be decoded): {some(skipped)}"
        lines = [text] if skipped else []
        bucket_of, buckets = self.buckets_of(self.training_images), self.dataset.buckets
        if bucket_of is not None:
            counts = np.bincount(bucket_of, minlength=len(buckets)).tolist()
            lines.append(told_buckets(buckets, counts, self.batch_size))
        return lines

    def prepare_data(self) -> None:
        """Compare the shards with the index, once on every machine."""
        if self._verify:
            verify(self._folder, self.index.shards)
            if self._validation is not None:
                verify(self._validation.folder, self._validation.index.shards)

    def on_after_batch_transfer(
        self, batch: tuple[Any, ...], dataloader_idx: int
    ) -> tuple[Images, Labels, *tuple[Pixels, ...]]:
        """Draw x_0, where the batch now is."""
        moments, labels, step, *pixels = batch
        drawn = sample_posterior(moments, self.seed, step, self.rank)
        if self._raw is not None:
            module: Any = self.trainer and self.trainer.lightning_module
            codec = getattr(getattr(module, "model", None), "codec", None)
            if not isinstance(codec, VAECodec):
                raise ValueError(
                    f"data.root={self._folder} holds latents without a scale: expected a "
                    f"DiffusionModule whose model has the autoencoder that tells it"
                )
            drawn = codec.scaled(drawn)
        return drawn, labels, *pixels

    def check(self, model: Model) -> None:
        """Check that a model can be trained on these latents; this reads its autoencoder.

        Raises:
            ValueError: shape, autoencoder or number of classes do not fit.
        """
        if model.denoiser.latent_shape != self.index.shape:
            raise ValueError(
                f"data.root={self._folder} holds latents of shape {self.index.shape}: expected "
                f"{model.denoiser.latent_shape}, that of the model; encode the images anew or "
                f"change the model's input_size and in_channels"
            )
        self.check_classes(model)
        # Every bucket has to be one that the network can be given.
        _check_sizes(f"data.root={self._folder}", self.dataset, model)
        if self._validation is not None:
            _check_sizes(f"data.validation={self._validation.folder}", self._validation, model)
        if self._raw is not None:
            if not isinstance(model.codec, VAECodec):
                raise ValueError(
                    f"data.root={self._folder} holds latents: expected a model with an autoencoder"
                )
            return
        here = self.index.config.get("encoder_sha256")
        there = encoder_sha256(model.codec) if isinstance(model.codec, VAECodec) else None
        if here != there:
            raise ValueError(
                f"data.root={self._folder} was encoded by another autoencoder ({here}) than the "
                f"model's ({there}): expected the same; pass it as vae=PATH, or encode anew"
            )
