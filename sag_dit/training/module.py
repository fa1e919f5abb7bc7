"""DiffusionModule: the LightningModule that trains a denoiser and draws with it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sag_dit.checkpoints import Model
from sag_dit.checkpoints.averages import place
from sag_dit.codec import VAECodec
from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.denoiser.checking import check_trainable
from sag_dit.noise import generator
from sag_dit.raised import is_ours
from sag_dit.sampling import Drawn, Request, Settings, Watch, draw_batch
from sag_dit.traces import Maps
from sag_dit.training.averaging import Further, warming_average
from sag_dit.training.fitting import out_of_memory, too_large
from sag_dit.training.loggers import check_one_number
from sag_dit.training.null_row import NullRow
from sag_dit.training.objective import MSE, Losses, Objective
from sag_dit.training.optimizers import (
    MakeOptimizer,
    Muon,
    averages_itself,
    begin,
    check_alone,
    check_sharded,
    copy_averages,
    in_proportion,
    parameters_of,
    refuse_measured,
    stand_in,
)
from sag_dit.training.param_groups import Group, describe_groups, grouped, trained_parameters

TRAINING = 3
"""Purpose of the random streams of training steps, see :func:`sag_dit.noise.generator`."""


log = logging.getLogger(__name__)

IMAGES = "images_in_a_step"
"""Where a checkpoint says how many images a step has seen, over all ranks."""


def images_in_a_step(trainer: Trainer) -> int | None:
    """Return how many images a step sees over all ranks, None of other data than a StepData."""
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    return size * trainer.accumulate_grad_batches if isinstance(size, int) else None


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


def _called(objective: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of an objective that are called, the outermost ones.

    Raises:
        ValueError: a parameter is in none of them, and so could not be sharded.
    """
    own = [name for name, _ in objective.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"trainer=fsdp: {type(objective).__name__}.{own[0]} is in no module that is called: "
            f"expected each parameter of an objective in a module of its own, or trainer=ddp"
        )
    for part in objective.children():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(part)
        else:
            yield part


class DiffusionModule(LightningModule):
    """Trains a model's denoiser on (images, labels), and draws requests with it.

    Images are uint8, or x_0 itself if they were encoded before, perhaps with the images behind the
    labels. ``objective`` says what is minimised; modules of its own are trained, saved and sharded
    beside the denoiser, and are no part of what is drawn with or exported.

    All randomness of a training step (times, noise, label dropout) is a pure function
    of (seed, batch index, rank).

    With ``ema_decay`` the exponential moving average of the weights is a module of its own,
    ``averaged``, and is updated after every optimiser step. The first update copies the weights, as
    published. With ``ema_warmup`` update n decays by only min(ema_decay, (1 + n) / (10 + n)), so
    that the average of a short run does not hold on to the first weights. Validation and drawing
    use the average. Since it is a module, it is sharded, saved and restored like the denoiser.
    ``further`` are averages beside it, which nothing here uses; ``ema_warmup`` holds for their
    decays too.

    ``param_groups`` are rules by which parameters get other settings of the optimiser than the
    rest, see :mod:`sag_dit.training.param_groups`. An optimiser that averages the weights itself,
    as the schedule-free ones do, takes the place of ``schedule`` and ``ema_decay``: ``averaged``
    then holds its average.

    A step whose gradients are not finite is skipped on all ranks; after ``max_skipped`` in a row
    training stops.

    Images are drawn with ``settings``. The first ``gallery`` indices are also drawn without
    guidance, from the same noise, and with ``maps`` their attention is kept. ``watch`` is called
    after every step of the sampler.

    Example::

        from lightning.pytorch import Trainer

        # Of a network of one's own for pixels; sag_dit.load(...) gives a model to go on from.
        denoiser = ClassConditional(network, Flow(), "v", x_0_range=(-1, 1))
        model = sag_dit.checkpoints.from_denoiser(denoiser, "mine")
        adamw = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)
        module = DiffusionModule(model, optimizer=adamw, ema_decay=0.9999)
        Trainer(max_steps=1000).fit(module, data)
    """

    VALIDATION_LOSS = "val/loss"
    """The name of the loss on held-out images."""

    def __init__(
        self,
        model: Model,
        *,
        objective: Objective | None = None,
        optimizer: MakeOptimizer | None = None,
        param_groups: Sequence[Any] = (),
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        further: Further | None = None,
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
        # Tells the settings of the optimiser, and whether it averages, before there is one.
        self._like = None if optimizer is None else stand_in(optimizer)
        self._averages_itself = self._like is not None and averages_itself(self._like)
        if self._like is not None:
            check_alone(self._like, schedule, ema_decay, (further or Further()).all)
        if ema_decay is not None:
            average: Any = warming_average if ema_warmup else get_ema_multi_avg_fn
            self.averaged = AveragedModel(self.denoiser, multi_avg_fn=average(ema_decay))
            self.averaged.requires_grad_(False)
        elif self._averages_itself:
            self.averaged = AveragedModel(self.denoiser)
            self.averaged.requires_grad_(False)
        self._further = further or Further()
        self.further = nn.ModuleDict(self._further.averages_of(self.denoiser, ema_warmup))
        self.objective = objective or MSE()
        self.objective.check(self.denoiser)
        self.objective.check_modules()
        self.averaged_objective: AveragedModel | None = None
        own = self._trained(self.objective)
        if self.averaged is not None and own and self.objective.averaged:
            self.averaged_objective = AveragedModel(
                cast(nn.Module, self.objective), multi_avg_fn=self.averaged.multi_avg_fn
            )
            self.averaged_objective.requires_grad_(False)
        self.settings = settings or Settings.of(model)
        self.gallery = gallery
        self.maps = maps
        self.seed = seed
        self.watch = watch
        self.skipped = 0
        self._skipped_in_a_row, self._ever_finite = 0, False
        self._max_skipped = max_skipped
        self._make_optimizer = optimizer
        self._param_groups = tuple(param_groups)
        if self._like is not None:
            self._check_trainable()
            self.groups()
        self._make_schedule = schedule
        self._is_sharded = False
        self._null_row: NullRow | None = None
        self.last_losses: Losses | None = None
        self._parts_of_step: list[dict[str, Tensor]] = []
        self.last_norm: Tensor | None = None
        self._logged_a_row = False
        self.seconds_drawing = 0.0
        """What drawing has taken, which is no part of training's speed."""

    @property
    def evaluated(self) -> Denoiser:
        """The denoiser that is validated and shown: the averaged one where there is one."""
        if self.averaged is None:
            return self.denoiser
        return cast(Denoiser, self.averaged.module)

    @property
    def averages(self) -> list[AveragedModel]:
        """All averages, the main one first."""
        main = [] if self.averaged is None else [self.averaged]
        return main + [cast(AveragedModel, each) for each in self.further.values()]

    def power_averages(self) -> Iterator[tuple[float, AveragedModel]]:
        """Yield the power-function averages with their sigma_rel."""
        for sigma_rel in map(float, self._further.sigma_rel):
            yield sigma_rel, cast(AveragedModel, self.further[place(sigma_rel)])

    def _check_trainable(self) -> None:
        """Refuse what could not be trained: nothing, or a network that gives no gradient.

        Raises:
            ValueError: the reason, with the network's class.
        """
        network = getattr(self.denoiser, "network", self.denoiser)
        if not self.trained:
            raise ValueError(
                f"{type(network).__name__}: none of its parameters is to be trained: expected some "
                f"with requires_grad"
            )
        if not is_ours(type(network)) and isinstance(self.denoiser, ClassConditional):
            check_trainable(self.denoiser)

    @staticmethod
    def _trained(*parts: Any) -> list[Parameter]:
        """Return the parameters that are trained, of the parts that have any."""
        modules = (each for each in parts if isinstance(each, nn.Module))
        return [p for each in modules for p in each.parameters() if p.requires_grad]

    @property
    def trained(self) -> list[Parameter]:
        """The parameters that are trained: the denoiser's, then the objective's own."""
        return self._trained(self.denoiser, self.objective)

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
        """Shard denoiser and averages block by block where the strategy shards models (FSDP2)."""
        mesh = self.device_mesh
        if mesh is None or self._is_sharded:
            return
        self._is_sharded = True
        for denoiser in (self.denoiser, *(cast(Denoiser, each.module) for each in self.averages)):
            if isinstance(denoiser, ClassConditional):
                for block in denoiser.network.blocks.children():
                    fully_shard(block, mesh=mesh["data_parallel"])
            # The network, since it is what objectives and guidance call.
            # Resharded after each forward: after one without a backward, as in validation, the
            # average would be left whole, and could not follow the sharded weights.
            fully_shard(denoiser.network, mesh=mesh["data_parallel"], reshard_after_forward=True)
        # An objective's modules each by itself, since it is they that are called.
        averaged = self.averaged_objective and self.averaged_objective.module
        for objective in (self.objective, averaged):
            if isinstance(objective, nn.Module):
                for part in _called(objective):
                    fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the trainable parameters, and its schedule stepped every step."""
        if self._make_optimizer is None:
            raise ValueError("optimizer=None: expected an optimiser to train with")
        groups = self.groups()
        if self._is_sharded and self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            check_sharded(self._make_optimizer, [settings for settings, _ in groups], mesh)
        optimizer = self._make_optimizer(parameters_of(groups))
        if self._averages_itself:
            begin(optimizer)
        # Gradients are looked at and clipped before the step: they are unscaled then, not in a
        # fused step, which Lightning would leave it to.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self._make_schedule is None:
            return optimizer
        with in_proportion(optimizer):
            schedule = {"scheduler": self._make_schedule(optimizer), "interval": "step"}
        refuse_measured(schedule["scheduler"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def groups(self) -> list[Group]:
        """Return the groups of the trainable parameters, with the settings that are their own.

        Raises:
            ValueError: no optimiser, a setting that it does not have, or a rule that changes
                nothing.
        """
        if self._like is None:
            raise ValueError("optimizer=None: expected an optimiser to train with")
        own = getattr(self._like, "group_rule", None)
        trained = trained_parameters(self.denoiser, self.objective)
        found = grouped(trained, self._param_groups, self._like.defaults, own)
        if isinstance(self._like, Muon):
            self._like.check_groups([settings for settings, _ in found])
        return found

    def groups_report(self) -> str:
        """Return the groups in words where there are several, else nothing."""
        groups = self.groups() if self._like is not None else []
        return describe_groups(groups, self._like.defaults) if self._like and groups[1:] else ""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what rebuilds the denoiser beside its weights, as plain values."""
        checkpoint["hyper_parameters"] = self.model.description
        checkpoint[IMAGES] = None if self._trainer is None else images_in_a_step(self._trainer)
        if self._trainer is not None and self._trainer.optimizers:
            # Which parameter each state of the optimiser is of, so that other groups can take it.
            names = {id(each): name for name, each in self.named_parameters()}
            groups = self._trainer.optimizers[0].param_groups
            held = [names.get(id(each)) for group in groups for each in group["params"]]
            checkpoint["optimizer_parameters"] = held if all(held) else None

    def losses(
        self, denoiser: Denoiser, batch: Sequence[Tensor], objective: Objective | None = None
    ) -> Losses:
        """Return an objective's losses of a batch: pixels, or x_0 perhaps with pixels behind."""
        images, labels, *rest = batch
        objective = objective or self.objective
        # Objectives older than pixels, and those that see none, are called as ever.
        encoded = images.is_floating_point()
        seen = (rest[0] if rest else None) if encoded else images
        told = {"pixels": seen} if objective.sees_pixels else {}
        if encoded:
            return objective(denoiser, images, labels, **told)
        codec = self.model.codec
        # Of the images' own size, which need not be that of all others.
        sides = (side // codec.factor for side in images.shape[2:])
        shape = (len(images), denoiser.latent_shape[0], *sides)
        noise = torch.randn(shape, device=images.device) if isinstance(codec, VAECodec) else None
        x_0 = codec.encode(images, noise)
        return objective(denoiser, x_0, labels, **told)

    @property
    def _bar_asks(self) -> bool:
        """Whether a bar asks for numbers at every step, for which the device is waited for.

        Lightning reads what is logged for a bar after each step, whoever shows it.
        """
        bar = self.trainer.progress_bar_callback
        return bar is not None and not getattr(bar, "shows_the_log", False)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log one number, as Lightning's modules do.

        Raises:
            ValueError: it is something else; the message names it and its shape.
        """
        check_one_number(name, value)
        super().log(name, value, *args, **options)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        self._seed(self.trainer.fit_loop.total_batch_idx)
        losses = self.losses(self.denoiser, batch)
        loss = losses.per_image.mean()
        # For callbacks that look at it; loggers get that of all ranks, at the end of the step.
        count = len(batch[1])
        self.log("train/loss", loss, logger=False, prog_bar=self._bar_asks, batch_size=count)
        self.last_losses = losses
        parts = {"loss": losses.per_image, **losses.terms}
        self._parts_of_step.append({name: each.detach() for name, each in parts.items()})
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what stands in the row that was logged last.

        Lightning repeats a number that is logged now and then in all rows to come.
        """
        if self._logged_a_row and self.trainer._results is not None:
            for each in self.trainer._results.values():
                # Means over an "epoch" go on.
                each.has_reset = each.has_reset or not each.meta.on_epoch
        self._logged_a_row = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what nobody sees between the steps that are logged, since each number takes time.

        Losses are the means over all batches of the step and over all ranks.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        ends = not self.trainer.fit_loop.epoch_loop._should_accumulate()
        due = ends and every > 0 and self.trainer.global_step % every == 0
        of_step = self._parts_of_step
        if ends:
            self._parts_of_step = []
        if not (due or self.trainer.should_stop):
            return
        self._logged_a_row = True
        if of_step:
            parts = of_step[0].keys()
            means = torch.stack(
                [torch.stack([b[n].float().mean() for b in of_step]).mean() for n in parts]
            )
            # A step that a callback of one rank ends is not that of the others.
            if due and self.trainer.world_size > 1:
                means = cast(Tensor, self.trainer.strategy.reduce(means, reduce_op="mean"))
            for name, mean in zip(parts, means, strict=True):
                self.log(f"train/{name}", mean, batch_size=len(batch[1]))
        if self.last_norm is not None:
            self.log("train/grad_norm", self.last_norm)
        if self.skipped:
            self.log("train/skipped", float(self.skipped))

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
        if not self._is_sharded and isinstance(self.denoiser, ClassConditional):
            self._null_row = NullRow(self.denoiser.network)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step on all ranks if any gradient is not finite.

        Gradients are the same on all ranks, or parts of one (sharded), so that the norm is common
        to them and they decide alike. Without a gradient an optimiser leaves a parameter alone.
        """
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.last_norm = norm
        self._look_at_null_row()
        if norm.isfinite():
            self._skipped_in_a_row, self._ever_finite = 0, True
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        for parameter in self.trained:
            parameter.grad = None
        if self._skipped_in_a_row >= self._max_skipped and not self._ever_finite:
            network = getattr(self.denoiser, "network", self.denoiser)
            raise ValueError(
                f"the gradients of the first {self._skipped_in_a_row} steps are not finite: "
                f"{type(network).__name__}, its loss or the data has NaN or infinite values from "
                f"the start; trainer.detect_anomaly=true tells in which operation, and "
                f"trainer.precision=32-true helps where 16 bits are too few"
            )
        if self._skipped_in_a_row >= self._max_skipped:
            raise ValueError(
                f"the gradients of {self._skipped_in_a_row} steps in a row are not finite, the "
                f"last at step {self.global_step}; the last checkpoint is kept. Try a lower "
                f"optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true"
            )

    def _look_at_null_row(self) -> None:
        """Warn once if the label that means 'no class' is not trained."""
        if self._null_row is None:
            return
        images = sum(len(each["loss"]) for each in self._parts_of_step)
        told = self._null_row.look(images)
        if told and self.trainer.is_global_zero:
            log.warning("%s", told)
        if self._null_row.done:
            self._null_row = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the averages follow; an average does not move in a skipped step."""
        super().optimizer_step(*args, **kwargs)
        if self._skipped_in_a_row > 0:
            return
        objectives = cast(nn.Module, self.objective), self.averaged_objective
        if self._averages_itself and self.averaged is not None:
            own: Any = self.optimizers(use_pl_optimizer=False)
            pairs = [(cast(nn.Module, self.denoiser), self.averaged.module)]
            if objectives[1] is not None:
                pairs.append((objectives[0], objectives[1].module))
            copy_averages(own, pairs)
            return
        for average in self.averages:
            average.update_parameters(self.denoiser)
        if objectives[1] is not None:
            objectives[1].update_parameters(objectives[0])

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the loss on held-out images, at the same times and noise at every validation."""
        self._seed(2**62 + batch_idx)
        averaged = self.averaged_objective
        objective = None if averaged is None else cast(Objective, averaged.module)
        loss, count = self.losses(self.evaluated, batch, objective).per_image.mean(), len(batch[1])
        self.log(
            self.VALIDATION_LOSS, loss, sync_dist=True, prog_bar=self._bar_asks, batch_size=count
        )

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
