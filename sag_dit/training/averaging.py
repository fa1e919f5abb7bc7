"""Averages of the weights while they are trained, and snapshots of power-function averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sag_dit.checkpoints.averages import (
    FOLDER,
    SNAPSHOTS,
    WIDEST,
    Taken,
    exponent,
    place,
    snapshot_file,
    snapshot_metadata,
    step_of,
)
from sag_dit.denoiser import Denoiser
from sag_dit.files import atomic

if TYPE_CHECKING:
    from sag_dit.training.module import DiffusionModule

Update = Callable[[Any, Any, Tensor | int], None]


def warming_average(decay: float) -> Update:
    """Return an update of averaged weights whose decay grows: min(decay, (1 + n) / (10 + n)).

    n counts the updates before. The first decays by 2/11, the hundredth by 101/110.

    Source: TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, number: Tensor | int) -> None:
        n = float(number)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def power_average(sigma_rel: float) -> Update:
    """Return an update of a power-function average: it keeps (1 - 1/t)^(gamma + 1) at update t.

    Raises:
        ValueError: ``sigma_rel`` is not between 0 and 0.2887.

    Source: Karras et al. 2024 (arXiv 2312.02696), equation 127.
    """
    power = float(exponent(sigma_rel)) + 1

    @torch.no_grad()
    def update(averaged: Any, current: Any, number: Tensor | int) -> None:
        t = float(number) + 1
        torch._foreach_lerp_(averaged, current, 1 - (1 - 1 / t) ** power)

    return update


@dataclass(frozen=True)
class Further:
    """Averages beside the main one: decays, and power-function averages by their sigma_rel.

    Raises:
        ValueError: a number is out of its range or comes twice.

    Example:
        >>> Further(decays=[0.999], sigma_rel=[0.05, 0.1]).all
        (0.999, 0.05, 0.1)
    """

    decays: Sequence[float] = ()
    sigma_rel: Sequence[float] = ()

    def __post_init__(self) -> None:
        for decay in self.decays:
            if not WIDEST <= decay < 1:
                raise ValueError(
                    f"ema.further.decays={decay}: expected {WIDEST:.4f} to less than 1, since a "
                    f"smaller number means a sigma_rel"
                )
        for sigma_rel in self.sigma_rel:
            if not 0.001 <= sigma_rel < WIDEST:
                raise ValueError(
                    f"ema.further.sigma_rel={sigma_rel}: expected 0.001 to less than {WIDEST:.4f}"
                )
        twice = [each for each in self.all if self.all.count(each) > 1]
        if twice:
            raise ValueError(f"ema.further: {twice[0]} comes twice: expected every average once")

    @property
    def all(self) -> tuple[float, ...]:
        """All of them, by the numbers that they are asked for by."""
        return tuple(map(float, (*self.decays, *self.sigma_rel)))

    def averages_of(self, denoiser: Denoiser, warmup: bool) -> dict[str, AveragedModel]:
        """Return an average of a denoiser for each, by the name of its place."""
        found = {}
        for number in self.all:
            decays: Any = warming_average if warmup else get_ema_multi_avg_fn
            rule = decays(number) if number in self.decays else power_average(number)
            average = AveragedModel(denoiser, multi_avg_fn=rule)
            found[place(number)] = average.requires_grad_(False)
        return found


def whole_weights(trainer: Trainer, denoiser: Denoiser) -> dict[str, Tensor]:
    """Return a network's weights on rank 0, nothing on the others; all ranks take part.

    Sharded weights are gathered one at a time.
    """
    state = {}
    for name, tensor in denoiser.network.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if trainer.is_global_zero:
            state[name] = whole.detach().cpu().clone()
    return state


class Snapshots(Callback):
    """Keeps snapshots of the power-function averages, of which averages of any length are made.

    One is taken every so many steps, before the checkpoint of that step. Of each average at most
    ``most`` are kept: where there would be more, those at every second step go, and so on, but the
    newest stays. Which are kept follows from the step alone, also after a stop.

    Example::

        trainer = Trainer(callbacks=[Snapshots(out, every_n_steps=1000, most=64)])
    """

    def __init__(self, out: Path, every_n_steps: int, most: int) -> None:
        self._folder, self._every, self._most = out / FOLDER, every_n_steps, most

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete what was taken after the step at which the run goes on; it is taken again."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for file in self._files():
                if step_of(file) > trainer.global_step:
                    file.unlink()
            for left in self._folder.glob(".*.tmp"):  # by a process that was killed while saving
                left.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(SNAPSHOTS))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Take a snapshot if it is time; all ranks do, since sharded weights need them all."""
        step = trainer.global_step
        if trainer.fit_loop.epoch_loop._should_accumulate() or step % self._every:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: DiffusionModule = pl_module
        for sigma_rel, average in module.power_averages():
            state = whole_weights(trainer, average.module)  # type: ignore[arg-type]
            if trainer.is_global_zero:
                taken = Taken(sigma_rel, step, int(average.n_averaged))
                self._write(state, taken, module.model.description)
        if trainer.is_global_zero:
            self._thin(step)

    def _write(self, state: dict[str, Tensor], taken: Taken, description: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        metadata = snapshot_metadata(taken, description)
        with atomic(snapshot_file(self._folder, taken.sigma_rel, taken.step)) as temporary:
            save_file(state, temporary, metadata=metadata)

    def _thin(self, now: int) -> None:
        there = self._files()
        kept = kept_steps(set(map(step_of, there)), now, self._every, self._most)
        for file in there:
            if step_of(file) not in kept:
                file.unlink()


def kept_steps(there: set[int], now: int, every: int, most: int) -> set[int]:
    """Return at which steps snapshots are kept: all, or evenly spaced ones and the newest.

    Those that a run has lost, since it went on from an earlier step, count as well, so that the
    answer is the same as if it had never been stopped.

    Example:
        >>> sorted(kept_steps({1, 2, 3, 4, 5}, now=5, every=1, most=3))
        [2, 4, 5]
    """
    steps = there | {*range(every, now + 1, every)}
    kept, spacing = steps, every
    while len(kept) > most and spacing < now:
        spacing *= 2
        kept = {step for step in steps if step % spacing == 0 or step == now}
    return kept
