"""A training step beside the peers': DiT-S/2, 256 latent tokens, learned variance, AdamW, average.

Ours is what Lightning's Trainer runs, logging and all, eager and with ``compile=true``, against the
steps of facebookresearch/DiT's and fast-DiT's ``train.py``. fast-DiT checkpoints every block; on
one process its Accelerate wrapping adds nothing that we time.

Steps alternate: our loader, before it hands out a batch, runs and times a step of every peer, and
what passes until it is asked again is one step of ours. Peak memory is of tensors, weights and
optimiser state included, over the first two steps.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.measure import peak_memory, seconds
from benchmarks.rows import Rows
from benchmarks.sizes import TINY, Scale
from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.models import SIZES, DiT
from sag_dit.process import DDPM
from sag_dit.training.callbacks import LossByLevel, Speed
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import Hybrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LATENT = 32
Batch = tuple[Tensor, Tensor]


def batch_of(size: int, latent: int = LATENT) -> Batch:
    """Return latents and labels."""
    return torch.randn(size, 4, latent, latent), torch.randint(0, 1000, (size,))


def imported(folder: str, name: str) -> ModuleType:
    """Import a peer's ``models.py`` under a name of its own, since both are called ``models``."""
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peers_of(
    folders: dict[str, str | None], size: str, latent: int = LATENT
) -> dict[str, Callable[[], Callable[[Batch], None]]]:
    """Return what builds the step of each peer whose checkout is given, all with one diffusion."""
    given = {name: folder for name, folder in folders.items() if folder}
    if not given:
        return {}
    sys.path.insert(0, next(iter(given.values())))
    diffusion = importlib.import_module("diffusion").create_diffusion(timestep_respacing="")

    def build(name: str, folder: str) -> Callable[[Batch], None]:
        models = imported(folder, name.replace("-", "_"))
        return peer_step(models.DiT_models[size](input_size=latent), diffusion)

    return {name: partial(build, name, folder) for name, folder in given.items()}


def peer_step(network: nn.Module, diffusion: Any) -> Callable[[Batch], None]:
    """Return one step of the peers' loop, without its data: what their ``train.py`` does."""
    network = network.to(DEVICE).train()
    average = deepcopy(network).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)

    def step(batch: Batch) -> None:
        x, y = (part.to(DEVICE) for part in batch)
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=DEVICE)
        loss = diffusion.training_losses(network, x, t, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            averages = OrderedDict(average.named_parameters())
            for name, parameter in network.named_parameters():
                averages[name].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        loss.item()

    return step


class ByTurns(IterableDataset[Batch]):
    """Hands out batches and times, between them, our step and one of every peer."""

    def __init__(
        self,
        size: int,
        rounds: int,
        peers: dict[str, Callable[[Batch], None]],
        latent: int = LATENT,
    ) -> None:
        self.size, self.rounds, self.peers, self.latent = size, rounds, peers, latent
        self.ours: list[float] = []
        self.theirs: dict[str, list[float]] = {name: [] for name in peers}

    def __iter__(self) -> Iterator[Batch]:
        batch = batch_of(self.size, self.latent)
        # The first two are for warming up, compilation included.
        for i in range(self.rounds + 2):
            times = {name: seconds(partial(step, batch)) for name, step in self.peers.items()}
            start = time.perf_counter()
            yield batch
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                self.ours.append(time.perf_counter() - start)
                for name, seconds_taken in times.items():
                    self.theirs[name].append(seconds_taken)


def our_trainer(rounds: int, precision: str = "32-true") -> Trainer:
    """Return the Trainer of ``train.py`` with what watches a step, and nothing that saves."""
    return Trainer(
        max_steps=rounds + 2,
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        callbacks=[Speed(50), LossByLevel(50)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=50,
    )


def our_module(
    compiled: bool, size: dict[str, int], latent: int = LATENT, checkpointed: bool = False
) -> DiffusionModule:
    """Return the module that ``experiment=imagenet256`` trains, with a DiT of another size."""
    with torch.device(DEVICE):
        network = DiT(latent, learn_sigma=True, **size)
    network.checkpoint_blocks = checkpointed
    if compiled:
        network.compile_blocks()
    denoiser = ClassConditional(network, DDPM())
    model = from_denoiser(denoiser, "DiT", codec=IdentityCodec())
    fused = DEVICE == "cuda"
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=fused)
    return DiffusionModule(model, objective=Hybrid(), optimizer=optimizer, ema_decay=0.9999).train()


def bare_step(size: dict[str, int], latent: int) -> Callable[[Batch], None]:
    """Return a step of the least loop that does the same: loss, gradients, AdamW, average."""
    module = our_module(False, size, latent)
    optimizer = torch.optim.AdamW(module.denoiser.parameters(), lr=1e-4, weight_decay=0)
    assert module.averaged is not None
    average = module.averaged

    def step(batch: Batch) -> None:
        x, y = (part.to(DEVICE) for part in batch)
        loss = module.losses(module.denoiser, (x, y)).per_image.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(module.denoiser)
        loss.item()

    return step


def beside(
    what: str,
    turns: ByTurns,
    module: DiffusionModule,
    rows: Rows,
) -> None:
    """Keep the ratios of our step's time to each peer's."""
    our_trainer(turns.rounds).fit(module, DataLoader(turns, batch_size=None))
    for name, theirs in turns.theirs.items():
        ratios = [ours / peer for ours, peer in zip(turns.ours, theirs, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.add(what, name, statistics.median(ratios), "", f"{low:.3f} to {high:.3f}")


def two_steps(make: Callable[[], Callable[[Batch], None]], size: int) -> None:
    """Build a peer and take the steps after which all its memory is in use."""
    step = make()
    for _ in range(2):
        step(batch_of(size))


def our_two_steps(size: dict[str, int], batch: int) -> None:
    """Do the same with ours."""
    our_trainer(0).fit(our_module(False, size), DataLoader(ByTurns(batch, 0, {}), batch_size=None))


def run(scale: Scale, rows: Rows, peer: str | None, fast: str | None) -> None:
    """Compare our step with a bare loop and the peers' steps, eager and compiled; and memory."""
    with rows.attempt("training step", "a bare loop"):
        # Of a network so small that a step is all overhead.
        bare = {"a bare loop": bare_step(TINY, 8)}
        turns = ByTurns(4, 20 * scale.training_rounds, bare, latent=8)
        beside("training step, 2 blocks of 48", turns, our_module(False, TINY, 8), rows)
    peers = peers_of({"facebookresearch": peer, "fast-DiT": fast}, scale.peer)
    if not peers:
        rows.add("training step", "", "not run: --peer and --fast name no checkout")
        return
    batch, size = scale.batch, SIZES[scale.peer]
    for how in ("eager", "compile=true"):
        with rows.attempt("training step", how):
            made = {name: make() for name, make in peers.items()}
            module = our_module(how != "eager", size)
            what = f"training step, {scale.peer}, {how}, batch {batch}"
            beside(what, ByTurns(batch, scale.training_rounds, made), module, rows)
            del made, module
    with rows.attempt("training step", "memory"):
        gc.collect()
        ours = peak_memory(partial(our_two_steps, size, batch))
        for name, make in peers.items():
            # What is freed within a measurement would count against what it allocates.
            gc.collect()
            theirs = peak_memory(partial(two_steps, make, batch))
            rows.add(f"training step, {scale.peer}, eager: peak memory", name, ours / theirs)
