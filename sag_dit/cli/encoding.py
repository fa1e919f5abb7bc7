"""Encoding one rank's share of a folder of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sag_dit.cli.latent_folder import LatentFolder
from sag_dit.codec import Pixels, VAECodec
from sag_dit.data.images import Crops
from sag_dit.data.shards import DTYPES, Index, pack
from sag_dit.data.training_batches import as_it_is, name_hash


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is encoded."""

    crops: Crops
    codec: VAECodec
    folder: LatentFolder
    index: Index
    """The index to be, still without shards."""
    rows: int

    @property
    def shards(self) -> int:
        """How many shards the images make."""
        return math.ceil(len(self.crops.files) / self.rows)

    def images_of(self, shard: int) -> range:
        """Return which images belong to a shard."""
        return range(shard * self.rows, min((shard + 1) * self.rows, len(self.crops.files)))


@dataclass(frozen=True)
class Job:
    """Some images of one shard."""

    shard: int
    images: Sequence[int]


@dataclass(frozen=True)
class Read:
    """What a loader process made of a job: the crops that could be read, and which, or an error."""

    job: Job
    kept: list[int]
    crops: Tensor
    error: str = ""


class Reader(Dataset[Read]):
    """Reads the crops of a job. Errors come back as text, without the loader's traceback."""

    def __init__(self, crops: Crops) -> None:
        self._crops = crops

    def __getitem__(self, job: Job) -> Read:
        kept, pixels = [], []
        try:
            for index in job.images:
                crop = self._crops.read(index)
                if crop is not None:
                    kept.append(index)
                    pixels.append(torch.from_numpy(crop))
        except (ValueError, OSError) as error:
            return Read(job, [], torch.empty(0), str(error))
        return Read(job, kept, torch.stack(pixels) if pixels else torch.empty(0))


def encode_crops(plan: Plan, crops: Pixels, device: torch.device) -> Tensor:
    """Return the moments (b, flips, 2, c, h, w) of crops, in the type they are stored in.

    Raises:
        ValueError: a value is not finite in that type.
    """
    crops = crops.to(device)
    views = [crops, crops.flip(-1)][: plan.index.flips]
    moments = torch.stack([torch.stack(plan.codec.posterior(view), dim=1) for view in views], dim=1)
    stored = moments.to(DTYPES[plan.index.dtype]).cpu()
    if not stored.isfinite().all():
        raise ValueError(
            f"dtype={plan.index.dtype}: a latent is not finite (the largest is "
            f"{moments.abs().max().item():.3g}); expected an undamaged autoencoder, and "
            f"dtype=float32 for one with values beyond 65504"
        )
    return stored


def encode_share(
    plan: Plan, rank: int, world: int, device: torch.device, workers: int
) -> Iterator[int]:
    """Encode the shards of one rank, every ``world``-th; yield how many images are done.

    A shard that is finished and intact is not made again.
    """
    done, jobs = 0, []
    size = plan.codec.slice_size
    for shard in range(rank, plan.shards, world):
        images = plan.images_of(shard)
        if plan.folder.finished(shard) is not None:
            done += len(images)
            yield done
        else:
            jobs += [Job(shard, images[at : at + size]) for at in range(0, len(images), size)]
    loader: DataLoader[Read] = DataLoader(
        Reader(plan.crops),
        sampler=jobs,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
    )
    files = plan.crops.files
    kept: list[int] = []
    # A shard of unreadable images is empty, but has a shape.
    nothing = torch.empty(0, plan.index.flips, 2, *plan.index.shape, dtype=DTYPES[plan.index.dtype])
    parts: list[Tensor] = []
    for read in loader:
        if read.error:
            raise ValueError(read.error)
        if read.kept:
            parts.append(encode_crops(plan, read.crops, device))
            kept += read.kept
        done += len(read.job.images)
        images = plan.images_of(read.job.shard)
        if read.job.images[-1] == images[-1]:
            skipped = [files.names[i] for i in sorted(set(images) - set(kept))]
            content = pack(
                torch.cat([nothing, *parts]),
                torch.from_numpy(files.labels[kept]),
                torch.tensor([name_hash(files.names[i]) for i in kept], dtype=torch.int64),
            )
            plan.folder.write(read.job.shard, content, len(kept), skipped)
            kept, parts = [], []
        yield done
