"""A small model of the digits, and a quiet trainer for a few steps of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.data.digits import CLASS_NAMES
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.training.module import DiffusionModule

ADAM = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
# Adam moves a weight by its rate whatever the size of its gradient. Where that is rounding alone,
# another rounding turns the step round. Under a large epsilon rounding stays as small as it is.
STEADY_ADAM = partial(ADAM, lr=0.3, eps=1.0)


def fresh_model(seed: int = 0, **options: Any) -> Model:
    """An untrained pixel DiT for 8x8 grey digits."""
    torch.manual_seed(seed)
    network = DiT(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=48,
        depth=2,
        num_heads=3,
        num_classes=10,
        learn_sigma=False,
        **options,
    )
    denoiser = ClassConditional(
        network, DDPM("cosine"), kind="v", x_0_range=(-1, 1), class_names=CLASS_NAMES
    )
    return from_denoiser(denoiser.train(), "digits-small", defaults={"batch_size": 4})


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"]))


def make_trainer(
    folder: Path, steps: int, callbacks: Iterable[Callback] = (), **options: Any
) -> Trainer:
    """A trainer for the CPU that neither logs nor validates unless told to."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
    }
    return Trainer(max_steps=steps, callbacks=list(callbacks), **{**defaults, **options})


def state(module: DiffusionModule) -> dict[str, Tensor]:
    """A copy of the denoiser's weights."""
    return {name: tensor.clone() for name, tensor in module.denoiser.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
