"""DiffusionModule: the LightningModule that trains a denoiser and draws with it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sag_dit.checkpoints import Model
from sag_dit.codec import VAECodec
from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.noise import generator
from sag_dit.sampling import Drawn, Request, Settings, Watch, draw_batch
from sag_dit.tensors import Images, Labels
from sag_dit.traces import Maps
from sag_dit.training.fitting import out_of_memory, too_large
from sag_dit.training.objective import MSE, Losses, Objective

TRAINING = 3
"""Purpose of the random streams of training steps, see :func:`sag_dit.noise.generator`."""


def warming_average(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """Return an update of averaged weights whose decay grows: min(decay, (1 + n) / (10 + n)).

    n counts the updates before. The first decays by 2/11, the hundredth by 101/110.

    Source: TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, number: Tensor | int) -> None:
        n = float(number)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


@contextmanager
def at_least_float32() -> Iterator[None]:
    """Make new tensors float32 where Lightning makes them 16 bits, as with precision=bf16-true.

    What is not the network's would be rounded: times such as 981.4 to 980, and variances.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class DiffusionModule(LightningModule):
    """Trains a model's denoiser on (images, labels), and draws requests with it.

    Images are uint8, or x_0 itself if they were encoded before. ``objective`` says what is
    minimised. All randomness of a training step (times, noise, label dropout) is a pure function
    of (seed, batch index, rank).

    With ``ema_decay`` the exponential moving average of the weights is a module of its own,
    ``averaged``, and is updated after every optimiser step. The first update copies the weights, as
    published. With ``ema_warmup`` update n decays by only min(ema_decay, (1 + n) / (10 + n)), so
    that the average of a short run does not hold on to the first weights. Validation and drawing
    use the average. Since it is a module, it is sharded, saved and restored like the denoiser.

    A step whose gradients are not finite is skipped on all ranks; after ``max_skipped`` in a row
    training stops.

    Images are drawn with ``settings``. The first ``gallery`` indices are also drawn without
    guidance, from the same noise, and with ``maps`` their attention is kept. ``watch`` is called
    after every step of the sampler.

    Example::

        from lightning.pytorch import Trainer

        module = DiffusionModule(model, ema_decay=0.9999)
        Trainer(max_steps=1000).fit(module, data)
    """

    def __init__(
        self,
        model: Model,
        *,
        objective: Objective | None = None,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_skipped: int = 10,
        settings: Settings | None = None,
        gallery: int = 0,
        maps: Maps | None = None,
        watch: Watch | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema.decay={ema_decay}: expected 0 to less than 1, or null for none")
        self.model = model
        # Registered by itself: the parameters that Lightning moves, wraps and saves.
        self.denoiser = model.denoiser
        self.averaged: AveragedModel | None = None
        if ema_decay is not None:
            average: Any = warming_average if ema_warmup else get_ema_multi_avg_fn
            self.averaged = AveragedModel(self.denoiser, multi_avg_fn=average(ema_decay))
            self.averaged.requires_grad_(False)
        self.objective = objective or MSE()
        self.objective.check(self.denoiser)
        self.settings = settings or Settings.of(model)
        self.gallery = gallery
        self.maps = maps
        self.seed = seed
        self.watch = watch
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._max_skipped = max_skipped
        self._make_optimizer = optimizer
        self._make_schedule = schedule
        self._is_sharded = False
        self.last_losses: Losses | None = None
        self.last_norm: Tensor | None = None
        self.seconds_drawing = 0.0
        """What drawing has taken, which is no part of training's speed."""

    @property
    def evaluated(self) -> Denoiser:
        """The denoiser that is validated and shown: the averaged one where there is one."""
        if self.averaged is None:
            return self.denoiser
        return cast(Denoiser, self.averaged.module)

    @contextmanager
    def model_to_draw_with(self) -> Iterator[Model]:
        """Lend the model with the averaged weights where there are any, ready to draw.

        Training goes on afterwards as if nothing had been drawn.
        """
        denoiser = self.evaluated
        was_training, since = denoiser.training, time.perf_counter()
        self.model.codec.to(self.device)
        denoiser.eval()
        try:
            yield replace(self.model, denoiser=denoiser)
        finally:
            denoiser.train(was_training)
            self.seconds_drawing += time.perf_counter() - since

    def configure_model(self) -> None:
        """Shard denoiser and average block by block where the strategy shards models (FSDP2)."""
        mesh = self.device_mesh
        if mesh is None or self._is_sharded:
            return
        self._is_sharded = True
        for denoiser in {self.denoiser, self.evaluated}:
            if isinstance(denoiser, ClassConditional):
                for block in denoiser.network.blocks.children():
                    fully_shard(block, mesh=mesh["data_parallel"])
            # The network, since it is what objectives and guidance call.
            # Resharded after each forward: after one without a backward, as in validation, the
            # average would be left whole, and could not follow the sharded weights.
            fully_shard(denoiser.network, mesh=mesh["data_parallel"], reshard_after_forward=True)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the trainable parameters, and its schedule stepped every step."""
        if self._make_optimizer is None:
            raise ValueError("optimizer=None: expected an optimiser to train with")
        trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        optimizer = self._make_optimizer(trained)
        # Gradients are looked at and clipped before the step: they are unscaled then, not in a
        # fused step, which Lightning would leave it to.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self._make_schedule is None:
            return optimizer
        schedule = {"scheduler": self._make_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what rebuilds the denoiser beside its weights, as plain values."""
        checkpoint["hyper_parameters"] = self.model.description

    def losses(self, denoiser: Denoiser, batch: tuple[Images, Labels]) -> Losses:
        """Return the objective's losses of a batch of pixels or of x_0."""
        images, labels = batch
        if images.is_floating_point():
            return self.objective(denoiser, images, labels)
        codec = self.model.codec
        shape = (len(images), *denoiser.latent_shape)
        noise = torch.randn(shape, device=images.device) if isinstance(codec, VAECodec) else None
        x_0 = codec.encode(images, noise)
        return self.objective(denoiser, x_0, labels)

    @property
    def _bar_asks(self) -> bool:
        """Whether a bar asks for numbers at every step, for which the device is waited for.

        Lightning reads what is logged for a bar after each step, whoever shows it.
        """
        bar = self.trainer.progress_bar_callback
        return bar is not None and not getattr(bar, "shows_the_log", False)

    def training_step(self, batch: tuple[Images, Labels], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        self._seed(self.trainer.fit_loop.total_batch_idx)
        losses = self.losses(self.denoiser, batch)
        loss = losses.per_image.mean()
        # For callbacks that look at it; loggers get that of all ranks, at the end of the step.
        count = len(batch[1])
        self.log("train/loss", loss, logger=False, prog_bar=self._bar_asks, batch_size=count)
        self.last_losses = losses
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what nobody sees between the steps that are logged, since each number takes time.

        Losses are the means over all ranks.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        ends = not self.trainer.fit_loop.epoch_loop._should_accumulate()
        due = ends and every > 0 and self.trainer.global_step % every == 0
        if not (due or self.trainer.should_stop):
            return
        if self.last_losses is not None:
            parts = {"loss": self.last_losses.per_image, **self.last_losses.terms}
            means = torch.stack([each.detach().float().mean() for each in parts.values()])
            # A step that a callback of one rank ends is not that of the others.
            if due and self.trainer.world_size > 1:
                means = cast(Tensor, self.trainer.strategy.reduce(means, reduce_op="mean"))
            for name, mean in zip(parts, means, strict=True):
                self.log(f"train/{name}", mean, batch_size=len(batch[1]))
        if self.last_norm is not None:
            self.log("train/grad_norm", self.last_norm)

    def setup(self, stage: str) -> None:
        """Have DDP on CPUs add gradients up in one order at all steps.

        After its first step it puts them into other buckets, and the place in a bucket decides in
        which order three ranks or more are added: a run that was interrupted would differ in the
        last bit. Where it looks for parameters without a gradient the buckets stay as they are.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy.root_device.type == "cpu":
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")

    def on_fit_start(self) -> None:
        """Bring the codec to where the denoiser is; it is no part of the module."""
        self.model.codec.to(self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step on all ranks if any gradient is not finite.

        Gradients are the same on all ranks, or parts of one (sharded), so that the norm is common
        to them and they decide alike. Without a gradient an optimiser leaves a parameter alone.
        """
        gradients = [p.grad for p in self.denoiser.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.last_norm = norm
        if norm.isfinite():
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        self.log("train/skipped", float(self.skipped), prog_bar=self._bar_asks)
        for parameter in self.denoiser.parameters():
            parameter.grad = None
        if self._skipped_in_a_row >= self._max_skipped:
            raise ValueError(
                f"the gradients of {self._skipped_in_a_row} steps in a row are not finite, the "
                f"last at step {self.global_step}; the last checkpoint is kept. Try a lower "
                f"optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the average follow; an average does not move in a skipped step."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None and self._skipped_in_a_row == 0:
            self.averaged.update_parameters(self.denoiser)

    def validation_step(self, batch: tuple[Images, Labels], batch_idx: int) -> None:
        """Log the loss on held-out images, at the same times and noise at every validation."""
        self._seed(2**62 + batch_idx)
        loss = self.losses(self.evaluated, batch).per_image.mean()
        count = len(batch[1])
        self.log("val/loss", loss, sync_dist=True, prog_bar=self._bar_asks, batch_size=count)

    def on_predict_start(self) -> None:
        """Bring the codec to where the denoiser is; it is no part of the module."""
        self.model.codec.to(self.device)

    def predict_step(self, batch: Sequence[Request], batch_idx: int) -> Drawn:
        """Draw one batch of requests, and for the gallery their twins and traces.

        Raises:
            ValueError: an image is not finite, or the batch does not fit the device's memory; what
                does fit is told.
        """
        shown = range(self.gallery)
        with at_least_float32():
            try:
                return draw_batch(
                    self.model,
                    batch,
                    self.settings,
                    twins=shown,
                    traced=shown,
                    maps=self.maps,
                    watch=self.watch,
                    spare=self.settings.spared,
                )
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Tried here, where the error no longer keeps what the batch held.
            raise ValueError(too_large(self.model, self.settings))

    def _seed(self, draw: int) -> None:
        """Seed torch for one batch, so that label dropout follows (seed, step) as well."""
        stream = generator(self.seed, draw, self.global_rank, TRAINING)
        seed = int(stream.integers(2**63))
        if self.device.type == "cpu":
            # torch.manual_seed would note it for every kind of device that may yet be used, which
            # takes a tenth of a small network's step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
