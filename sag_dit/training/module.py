"""DiffusionModule: the LightningModule that trains a denoiser and draws with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sag_dit.checkpoints import Model
from sag_dit.noise import generator
from sag_dit.output.views import ViewRecorder
from sag_dit.output.writer import Drawn
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Request, Settings, Watch, draw
from sag_dit.tensors import Images, Labels
from sag_dit.training.objective import MSE, Objective

TRAINING = 3
"""Purpose of the random streams of training steps, see :func:`sag_dit.noise.generator`."""


class DiffusionModule(LightningModule):
    """Trains a model's denoiser on (uint8 images, labels), and draws requests with it.

    ``objective`` says what is minimised. All randomness of a training step (times, noise, label
    dropout) is a pure function of (seed, batch index, rank). Prediction follows ``settings``; the
    first ``gallery`` indices are also drawn without guidance, from the same noise. ``watch`` is
    told of every step.
    """

    def __init__(
        self,
        model: Model,
        *,
        objective: Objective | None = None,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None,
        settings: Settings | None = None,
        gallery: int = 0,
        watch: Watch | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        # Registered by itself: the parameters that Lightning moves, wraps, averages and saves.
        self.denoiser = model.denoiser
        self.objective = objective or MSE()
        self.objective.check(self.denoiser)
        self.settings = settings or Settings(batch_size=model.batch_size)
        self.gallery = gallery
        self.seed = seed
        self.watch = watch
        self._make_optimizer = optimizer

    def configure_optimizers(self) -> Optimizer:
        """Return the optimiser of the trainable parameters."""
        if self._make_optimizer is None:
            raise ValueError("optimizer=None: expected an optimiser to train with")
        return self._make_optimizer(p for p in self.denoiser.parameters() if p.requires_grad)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what rebuilds the denoiser beside its weights, as plain values."""
        checkpoint["hyper_parameters"] = self.model.description

    def loss(self, images: Images, labels: Labels) -> Tensor:
        """Return the mean objective over a batch."""
        x_0 = self.model.codec.encode(images)
        return self.objective(self.denoiser, x_0, labels).per_image.mean()

    def training_step(self, batch: tuple[Images, Labels], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        self._seed(self.trainer.fit_loop.total_batch_idx)
        loss = self.loss(*batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Images, Labels], batch_idx: int) -> None:
        """Log the loss on held-out images, at the same times and noise at every validation."""
        self._seed(2**62 + batch_idx)
        loss = self.loss(*batch)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))

    def on_predict_start(self) -> None:
        """Bring the codec to where the denoiser is; it is no part of the module."""
        self.model.codec.to(self.device)

    def predict_step(self, batch: Sequence[Request], batch_idx: int) -> Drawn:
        """Draw one batch of requests, and for the gallery their twins and views."""
        shown = [row for row, request in enumerate(batch) if request.index < self.gallery]
        recorder = ViewRecorder(self.settings, self.denoiser)

        def watch(step: SampleStep) -> None:
            if shown:
                recorder(step)
            if self.watch is not None:
                self.watch(step)

        images = draw(self.model, batch, self.settings, watch)
        twins = {}
        if shown:
            unguided = replace(self.settings, guidance=())
            drawn = draw(self.model, [batch[row] for row in shown], unguided)
            twins = {batch[row].index: twin for row, twin in zip(shown, drawn, strict=True)}
        views = {batch[row].index: recorder.views(row) for row in shown}
        return Drawn(batch, images, twins, views)

    def _seed(self, draw: int) -> None:
        """Seed torch for one batch, so that label dropout follows (seed, step) as well."""
        stream = generator(self.seed, draw, self.global_rank, TRAINING)
        torch.manual_seed(int(stream.integers(2**63)))
