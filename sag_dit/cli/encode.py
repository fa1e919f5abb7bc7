"""``encode.py``: encode a folder of images to latents once, on one device or many."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.app import alone_in, launch, quiet_lightning
from sag_dit.cli.composing import make
from sag_dit.cli.keys import Encode
from sag_dit.cli.trainer_flags import check_encoding
from sag_dit.identity import LATER, digest, settings

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from rich.progress import Progress

    from sag_dit.data.encoding import EncodingPlan, LatentFolder
    from sag_dit.data.shards import Index

log = logging.getLogger(__name__)

NOTE_EVERY = 1.0
"""Seconds between a rank's notes of how far it is."""


@dataclass(frozen=True)
class Encoding:
    """What determines latents.

    A field that is added has to be marked ``LATER``; see :mod:`sag_dit.identity`.

    Example::

        name = f"photos-{digest(settings(encoding))[:8]}"
    """

    images: int
    images_sha256: str
    size: int | list[int]
    upright: bool
    flip: bool
    dtype: str
    rows: int
    slice_size: int
    encoder_sha256: str
    scaling_factor: float
    background: str | None = field(default=None, metadata=LATER)
    shift_factor: float | None = field(default=None, metadata=LATER)
    buckets: list[list[int]] | None = field(default=None, metadata=LATER)
    latents_mean: Sequence[float] | None = field(default=None, metadata=LATER)
    latents_std: Sequence[float] | None = field(default=None, metadata=LATER)


def plan_encoding(config: Encode) -> EncodingPlan:
    """Check the configuration, list the images and load the autoencoder.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    from sag_dit.checkpoints.loading import autoencoder_named, find_codec
    from sag_dit.checkpoints.model import plain_name
    from sag_dit.codec import VAECodec
    from sag_dit.data.crop import sides
    from sag_dit.data.encoding import EncodingPlan
    from sag_dit.data.images import (
        Crops,
        check_buckets,
        find_images,
        latent_size,
        listing_sha256,
        stated_buckets,
    )
    from sag_dit.data.latents import encoder_sha256
    from sag_dit.data.shards import Index

    if config.vae is None:
        raise ValueError(
            "vae=null: expected an autoencoder (ema, mse, a folder or a hub repository); a pixel "
            "model needs no encoding, train it on the images: data=folder data.root=..."
        )
    # The images, and the autoencoder with the crops that it takes.
    files = find_images(config.data.root, config.data.labels, config.data.class_names)
    codec = find_codec(config.vae, config.slice_size)
    assert isinstance(codec, VAECodec)  # There is one.
    height, width = (latent_size(side, codec.factor) for side in sides(config.data.size))
    buckets = None
    if config.data.buckets is not None:
        buckets = stated_buckets(config.data.buckets, config.data.size)
        check_buckets(config.data.buckets, buckets, codec.factor)
    crops = Crops(
        files,
        config.data.size,
        channels=codec.in_channels,
        upright=config.data.upright,
        background=config.data.background,
        strict=config.data.strict,
        buckets=buckets or (),
    )
    # What determines the latents, which names their folder.
    identity = settings(
        Encoding(
            images=len(files),
            images_sha256=listing_sha256(files),
            size=config.data.size,
            upright=config.data.upright,
            flip=config.flip,
            dtype=config.dtype,
            rows=config.rows,
            slice_size=config.slice_size,
            buckets=None if buckets is None else [[*each] for each in buckets],
            encoder_sha256=encoder_sha256(codec),
            **codec.settings,
        )
    )
    name = plain_name(files.root.resolve().name.removesuffix(".zip").removesuffix(".tar"))
    folder, identity = _folder_of(config, name, identity)
    crops.background = identity.get("background")
    # The index to be.
    index = Index(
        config=identity,
        vae=autoencoder_named(config.vae),
        class_names=files.class_names,
        shape=(codec.latent_channels, height, width),
        dtype=config.dtype,
        flips=2 if config.flip else 1,
        counts=(0,) * len(files.class_names),
        shards=(),
    )
    return EncodingPlan(crops, codec, folder, index, config.rows)


def _folder_of(
    config: Encode, name: str, identity: dict[str, Any]
) -> tuple[LatentFolder, dict[str, Any]]:
    """Return where latents go, and their identity, with the background where they know of one.

    Folders had names before there was a background, so the name tells of it only where the one
    without it is taken by another. What was begun before there was one goes on without.
    """
    from sag_dit.data.encoding import LatentFolder

    background = config.data.background
    told = identity if background is None else {**identity, "background": background}
    place = config.out or f"outputs/latents/{name}-{digest(identity)[:8]}"
    folder = LatentFolder(Path(place))
    before = folder.settings()
    if before == identity:
        return folder, identity
    if before and before != told and config.out is None:
        folder = LatentFolder(Path(f"outputs/latents/{name}-{digest(told)[:8]}"))
    return folder, told


def progress_bar() -> Progress:
    """Return a bar of images of all ranks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        console=Console(stderr=True),
    )


def run_encode(config: Encode) -> None:
    """Encode what is missing; rank 0 then checks that all is there and writes the index."""
    check_encoding(config.trainer)
    quiet_lightning()
    from lightning.fabric import Fabric

    plan = plan_encoding(config)
    folder = plan.folder
    fabric = make({"_target_": "lightning.fabric.Fabric", **config.trainer}, "trainer", Fabric)
    folder.claim(plan.index.config)
    index = folder.finished_index if not os.access(folder.path, os.W_OK) else None
    if index is None:
        with alone_in(folder.path):
            index = _encode(config, plan, fabric)
    if index is None:
        return
    skipped = sum(len(shard.skipped) for shard in index.shards)
    left_out = f", {skipped} could not be decoded" if skipped else ""
    print(f"latents: {folder.path} ({index.images} images{left_out})")


def _encode(config: Encode, plan: EncodingPlan, fabric: Fabric) -> Index | None:
    """Encode on all ranks; return the index on the first one."""
    import numpy as np

    from sag_dit.data.encoding import encode_share
    from sag_dit.data.images import CHECKED_UP_FRONT, told_buckets, told_left_out
    from sag_dit.data.training_batches import workers_per_process
    from sag_dit.output.ranks import RankReports

    # Rank 0 looks at the images before the other ranks start.
    folder, crops = plan.folder, plan.crops
    if fabric.global_rank == 0:
        plan.check_room()
        for text in told_left_out(crops.files.left_out):
            log.warning("left out are %s", text)
        if len(crops.buckets) > 1:
            counts = np.bincount(crops.bucket_of, minlength=len(crops.buckets)).tolist()
            print(told_buckets(crops.buckets, counts, batch_size=1))
        if crops.strict or len(crops.files) <= CHECKED_UP_FRONT:
            for text in crops.inspect().told(crops):
                log.warning("%s", text)
    fabric.launch()
    # Every rank encodes its share; rank 0 shows how far all are.
    rank, world = fabric.global_rank, fabric.world_size
    workers = config.workers
    if workers is None:
        workers = workers_per_process(world // config.trainer.get("num_nodes", 1))
    reports = RankReports(folder.path, rank, world)
    bar = progress_bar()
    bar.disable = rank != 0
    with bar:
        task = bar.add_task("encoding", total=len(crops.files))

        def done_by_all() -> int:
            done = folder.done(world)
            bar.update(task, completed=done)
            return done

        with reports.reporting():
            folder.note(rank, 0)
            # So that no rank reads what another has left from an earlier run.
            fabric.barrier()
            plan.codec.to(fabric.device)
            done, noted = 0, time.monotonic()
            for done in encode_share(plan, rank, world, fabric.device, workers):
                if time.monotonic() - noted > NOTE_EVERY:
                    folder.note(rank, done)
                    noted = time.monotonic()
                    if rank == 0:
                        done_by_all()
            folder.note(rank, done)
        if rank != 0:
            return None
        reports.wait(done_by_all)
        done_by_all()
    # All is there.
    reports.clear()
    return folder.finish(len(plan.shards), plan.index)


main = partial(launch, "encode", run_encode)
"""Run ``encode.py``, with the arguments of the command line unless others are given."""
