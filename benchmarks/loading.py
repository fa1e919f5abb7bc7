"""Measure how fast training data is served: ``python -m benchmarks.loading [--images 4096]``.

    latents    one loader process on shards of moments, as encode.py writes them, 32 x 32 x 4
    npy        one loader process on one .npy file of the same moments per image
    images     one loader process on JPEG files of 500 x 375 pixels: decoding, ADM's crop, flip
    vae        the autoencoder's encoder at 256 pixels, which training on images pays on top
    step       a training step of DiT-S/2 at batch 16: what all of it has to keep up with

Rates are images per second on this machine; beside each stands how many times what the training
step consumes it is. Files are in the page cache, for all of them alike. What a loader process has
prepared beforehand is taken from it before the clock starts.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Work, seconds
from sag_dit.data.images import ImageFolderData
from sag_dit.data.latents import LatentData, sample_posterior
from sag_dit.data.shards import INDEX, Index, Shard, pack
from sag_dit.models import dit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (4, 32, 32)
BATCH = 64
STEP_BATCH = 16
PREFETCHED = 2


def write_latents(root: Path, images: int, rows: int = 1024) -> None:
    """Write shards of random moments for images and their mirror images."""
    shards = []
    for number, start in enumerate(range(0, images, rows)):
        count = min(rows, images - start)
        moments = torch.randn(count, 2, 2, *SHAPE).half()
        order = torch.arange(start, start + count)
        content = pack(moments, order % 10, order)
        file = f"latents-{number:05d}.safetensors"
        (root / file).write_bytes(content)
        shards.append(Shard(file, count, len(content), hashlib.sha256(content).hexdigest()))
    counts = tuple(len(range(label, images, 10)) for label in range(10))
    names = tuple(map(str, range(10)))
    index = Index({}, "", names, SHAPE, "float16", 2, counts, tuple(shards))
    (root / INDEX).write_text(index.to_json())


class NpyFiles(Dataset[torch.Tensor]):
    """One file of moments per image, as the common scripts have it."""

    def __init__(self, root: Path, images: int) -> None:
        self.files = [root / f"{number}.npy" for number in range(images)]
        for file in self.files:
            np.save(file, np.random.default_rng(0).random((2, *SHAPE)).astype(np.float16))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self.files[index]))


def write_photos(root: Path, images: int) -> None:
    """Write JPEG files of ImageNet's usual size, with detail at every scale."""
    random = np.random.default_rng(0)
    for number in range(images):
        layers = [
            Image.fromarray(random.integers(0, 256, (side * 3, side * 4, 3), dtype=np.uint8))
            for side in (2, 8, 32, 125)
        ]
        scaled = [np.asarray(layer.resize((500, 375)), dtype=np.float32) for layer in layers]
        picture = np.average(scaled, axis=0, weights=(8, 4, 2, 1)).astype(np.uint8)
        Image.fromarray(picture).save(root / f"{number:05d}.jpg", quality=90)


def endless(loader: DataLoader[object]) -> Iterator[object]:
    """Repeat a loader's epochs."""
    while True:
        yield from loader


@dataclass(frozen=True)
class Timed:
    """Work that gives a number of images, and what has to be done before the clock starts."""

    work: Work
    images: int
    before: Work = lambda: None


def loading(batches: Iterator[object], count: int) -> Timed:
    """Return the work of taking ``count`` batches that were not prepared beforehand."""

    def take(number: int) -> None:
        for _ in range(number):
            next(batches)

    return Timed(lambda: take(count), count * BATCH, lambda: take(PREFETCHED + 1))


def training_step() -> Work:
    """Return one training step of DiT-S/2 at batch 16: forward, backward and AdamW."""
    network = dit("DiT-S/2", input_size=32).to(DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    x = torch.randn(STEP_BATCH, *SHAPE, device=DEVICE)
    t = torch.full((STEP_BATCH,), 500, device=DEVICE)
    y = torch.zeros(STEP_BATCH, dtype=torch.int64, device=DEVICE)

    def work() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = network(x, t, y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def vae_encoding() -> Work:
    """Return the encoding of one 256-pixel image by Stable Diffusion's autoencoder."""
    from diffusers.models import AutoencoderKL

    blocks = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    ).to(DEVICE)
    image = torch.randn(1, 3, 256, 256, device=DEVICE)

    def work() -> None:
        with torch.no_grad():
            vae.encode(image)

    return work


def main() -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4096, help="latents and .npy files")
    parser.add_argument("--photos", type=int, default=256, help="JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / name for name in ("latents", "npy", "photos")]
        for root in roots:
            root.mkdir()
        write_latents(roots[0], options.images)
        write_photos(roots[2], options.photos)
        npy = NpyFiles(roots[1], options.images)
        per_file: DataLoader[object] = DataLoader(  # type: ignore[assignment]
            npy, BATCH, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True
        )
        latents = LatentData(roots[0], BATCH, workers=1)
        photos = ImageFolderData(roots[2], 256, BATCH, workers=1)
        moments = torch.randn(BATCH, 2, *SHAPE, device=DEVICE).half()
        works = {
            "training step, DiT-S/2": Timed(training_step(), STEP_BATCH),
            "latents": loading(iter(latents.train_dataloader()), 200),
            "npy": loading(endless(per_file), 40),
            "images": loading(iter(photos.train_dataloader()), 3),
            "drawing x_0 from moments": Timed(lambda: sample_posterior(moments, 0, 0, 0), BATCH),
            "vae": Timed(vae_encoding(), 1),
        }
        rates: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(options.rounds + 1):
            for name, timed in works.items():
                timed.before()
                taken = seconds(timed.work)
                if turn:  # the first is to warm up
                    rates[name].append(timed.images / taken)
    print("| what | images/s | lowest to highest | times the training step |\n|---|---|---|---|")
    needed = statistics.median(rates["training step, DiT-S/2"])
    for name, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):.3g} to {max(found):.3g}"
        print(f"| {name} | {median:.4g} | {spread} | {median / needed:.3g} |")


if __name__ == "__main__":
    main()
