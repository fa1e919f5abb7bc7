"""A training step in bf16-mixed: images a second, MFU and memory; beside it the peers' steps."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader

from benchmarks.measure import seconds
from benchmarks.rows import Rows
from benchmarks.sizes import DEVICE, Scale, arithmetic, share_of_peak
from benchmarks.training import Batch, ByTurns, batch_of, our_module, our_trainer, peers_of
from sag_dit.training.callbacks import training_flops


def ours(
    size: dict[str, int], batch: int, scale: Scale, compiled: bool, checkpointed: bool
) -> tuple[float, float, float]:
    """Return our step's seconds, its operations, and the peak memory in GiB."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    turns = ByTurns(batch, scale.training_rounds, {}, latent=scale.latent)
    module = our_module(compiled, size, scale.latent, checkpointed)
    trainer = our_trainer(scale.training_rounds, "bf16-mixed")
    trainer.fit(module, DataLoader(turns, batch_size=None))
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else float("nan")
    return statistics.median(turns.ours), batch * (training_flops(module.model) or 0), memory


def theirs(
    make: Callable[[], Callable[[Batch], None]], batch: int, scale: Scale, autocast: bool
) -> float:
    """Return the seconds of a peer's step."""
    step, given = make(), batch_of(batch, scale.latent)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for _ in range(2):
            step(given)
        return statistics.median(
            seconds(partial(step, given)) for _ in range(scale.training_rounds)
        )


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Measure ours with and without compilation and checkpointing, then the peers'."""
    with arithmetic("TF32"):
        for name, (size, batch) in scale.training.items():
            for compiled, checkpointed in ((False, False), (True, False), (False, True)):
                how = ["bf16-mixed"] + ["compile"] * compiled + ["checkpointing"] * checkpointed
                setting = f"DiT-{name}, batch {batch}, {' + '.join(how)}"
                with rows.attempt("training step", setting):
                    took, operations, memory = ours(size, batch, scale, compiled, checkpointed)
                    note = share_of_peak(operations, took, "bf16-mixed")
                    note += f"; peak {memory:.1f} GiB" if memory == memory else ""
                    rows.add("training step", setting, batch / took, "images/s", note.strip("; "))
        _, batch = next(iter(scale.training.values()))
        for title, folder, autocast in (
            ("facebookresearch", peer, False),
            ("fast-DiT", fast, True),
        ):
            if folder is None:
                rows.add(f"{title}'s step", "", "not run: no checkout was named")
                continue
            how = "bf16 autocast + checkpointing" if autocast else "TF32, as published"
            setting = f"{scale.peer}, batch {batch}, {how}"
            with rows.attempt(f"{title}'s step", setting):
                gc.collect()
                make = peers_of({title: folder}, scale.peer, scale.latent)[title]
                took = theirs(make, batch, scale, autocast)
                rows.add(f"{title}'s step", setting, batch / took, "images/s")
