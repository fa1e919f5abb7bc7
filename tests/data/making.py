"""Small folders of images, latents and an autoencoder to test with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sag_dit.data.shards import INDEX, Index, Shard, pack
from sag_dit.data.training_batches import name_hash


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that a JPEG of it is close to it."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_folder(
    root: Path, classes: Sequence[str] = ("cats", "dogs"), each: int = 4, side: int = 20
) -> Path:
    """Class folders of JPEG and PNG images, none of the same size as the next."""
    for number in range(each * len(classes)):
        name = classes[number % len(classes)]
        (root / name).mkdir(parents=True, exist_ok=True)
        ending = "png" if number % 3 else "jpg"
        image = picture(side + number, side + 2, seed=number)
        image.save(root / name / f"{number:02d}.{ending}")
    return root


def truncate(path: Path) -> Path:
    """Cut an image off in the middle: its header stays readable."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def save_vae(folder: Path, **options: Any) -> Path:
    """An AutoencoderKL with random weights: factor 2, 4 channels."""
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.1, **options},
    ).save_pretrained(folder)
    return folder


def latent_folder(
    root: Path,
    rows: Sequence[int] = (4, 3, 5),
    *,
    flips: int = 2,
    std: float = 0.5,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Shards whose means tell where they are from: mean = image number, + 1/2 if mirrored."""
    root.mkdir(parents=True, exist_ok=True)
    shape = (2, 3, 4)
    shards, start = [], 0
    for number, count in enumerate(rows):
        moments = torch.full((count, flips, 2, *shape), std)
        moments[:, :, 0] = torch.arange(start, start + count).reshape(-1, 1, 1, 1, 1)
        moments[:, 1:, 0] += 0.5
        labels = torch.arange(start, start + count) % 2
        names = torch.tensor([name_hash(f"{i}.png") for i in range(start, start + count)])
        content = pack(moments.to(dtype), labels, names.to(torch.int64))
        file = f"latents-{number:05d}.safetensors"
        (root / file).write_bytes(content)
        shards.append(Shard(file, count, len(content), hashlib.sha256(content).hexdigest()))
        start += count
    index = Index(
        config={"encoder_sha256": "of a test"},
        vae="ema",
        class_names=("even", "odd"),
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        flips=flips,
        counts=((start + 1) // 2, start // 2),
        shards=tuple(shards),
    )
    (root / INDEX).write_text(index.to_json())
    return root


def same(one: Any, other: Any) -> bool:
    """Whether two lists of batches are equal, bit for bit."""
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def trainer(rank: int = 0, world: int = 1, total_batch_idx: int = -1) -> Any:
    """What a data module asks of its trainer."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        num_devices=world,
        fit_loop=SimpleNamespace(total_batch_idx=total_batch_idx),
        overfit_batches=0,
    )
