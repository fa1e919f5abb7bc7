"""Watching a training run: speed, loss by noise level, pictures, and metrics of drawn images."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

from sag_dit.checkpoints import Model, build
from sag_dit.evaluation.suite import Suite, metric_kind
from sag_dit.files import atomic
from sag_dit.guidance import Term
from sag_dit.messages import nearest
from sag_dit.models import family_for
from sag_dit.raised import is_ours
from sag_dit.sampling import Request, Settings, draw_batch, drawn, labels_of
from sag_dit.training.module import DiffusionModule
from sag_dit.training.peaks import peak_flops
from sag_dit.training.resume import BestCheckpoints, best_checkpoint

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BINS = 4
"""The loss is logged for this many equal parts of the process, 0 being the least noise."""


NO_EPOCHS = "a run counts steps and not epochs"
UNFIT: Sequence[tuple[type[Callback], str]] = (
    (
        StochasticWeightAveraging,
        f"{NO_EPOCHS}, at whose end it averages; expected ema.decay, or ema.further for more",
    ),
    (
        WeightAveraging,
        "it exchanges the weights that checkpoints hold, and a run averages them itself; expected "
        "ema.decay, or ema.further for more",
    ),
    (
        GradientAccumulationScheduler,
        "checkpoints and validation count on one number of batches in all steps; expected "
        "trainer.accumulate_grad_batches",
    ),
    (
        LearningRateFinder,
        "it trains before the run and goes back, which a run that goes on cannot repeat; expected "
        "several short runs, by -m optimizer.lr=1e-4,3e-4,1e-3",
    ),
    (
        BatchSizeFinder,
        "batches follow from data.batch_size, which it would change; expected data.batch_size, of "
        "which the start of a run tells the memory",
    ),
    (
        BaseFinetuning,
        f"{NO_EPOCHS}, at which it sets weights free; expected freeze, and a second run by "
        f"resume_from to train more of them",
    ),
    (
        OnExceptionCheckpoint,
        "a step that an error has cut in two is none to go on from; expected "
        "every_n_steps.checkpoint or every_n_minutes.checkpoint",
    ),
    (
        ModelPruning,
        f"{NO_EPOCHS}, at whose end it prunes, and it renames the weights that checkpoints and "
        f"averages hold; expected to prune the exported model",
    ),
)
"""Callbacks of Lightning's that cannot work in a run, and what does."""

OF_EPOCHS: Sequence[tuple[type[Callback], Callable[[Any], bool], str]] = (
    (ModelCheckpoint, lambda each: each._every_n_epochs > 1, "every_n_train_steps"),
    (ModelCheckpoint, lambda each: each._save_on_train_epoch_end, "save_on_train_epoch_end=false"),
    (EarlyStopping, lambda each: each._check_on_train_epoch_end, "check_on_train_epoch_end=false"),
    (LearningRateMonitor, lambda each: each.logging_interval == "epoch", "logging_interval=step"),
    (Timer, lambda each: each._interval == "epoch", "interval=step"),
)
"""Those whose settings make them wait for the end of an epoch, and the setting that acts."""


LOGGING = (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor)
"""Those that hand what they measure to loggers, and do nothing else."""


def check_callbacks(
    callbacks: Iterable[Callback], *, epochs: bool = False, logs: bool = True
) -> None:
    """Refuse callbacks of Lightning's that would do nothing in a run, or take it over.

    With ``epochs`` the Trainer ends some, as by ``limit_train_batches``. ``logs`` says whether
    there is a logger.

    Raises:
        ValueError: such a callback; the message says what to set instead.

    Example:
        >>> check_callbacks([EarlyStopping("val/loss")])
    """
    for each in callbacks:
        name = type(each).__name__
        for kind, reason in UNFIT:
            if isinstance(each, kind):
                raise ValueError(f"trainer.callbacks: {name} cannot work here: {reason}")
        for kind, waits, remedy in OF_EPOCHS:
            if isinstance(each, kind) and waits(each) and not epochs:
                raise ValueError(
                    f"trainer.callbacks: {name} waits for the end of an epoch, and {NO_EPOCHS}; "
                    f"expected {remedy}"
                )
        if isinstance(each, LOGGING) and not logs:
            raise ValueError(
                f"trainer.callbacks: {name} hands what it measures to a logger, and there is none; "
                f"expected one, such as logger=csv"
            )
        if isinstance(each, ModelCheckpoint) and each.save_top_k == 0 and not each.save_last:
            raise ValueError(
                f"trainer.callbacks: {name} writes nothing with save_top_k: 0; expected 1 or more, "
                f"-1 for all, or save_last: true"
            )


def strange_hooks(callback: Callback) -> list[str]:
    """Return what is told of methods that look like hooks, but that Lightning never calls.

    Example:
        >>> strange_hooks(EarlyStopping("val/loss"))
        []
    """
    hooks = [name for name in dir(Callback) if name.startswith("on_")]
    own = [name for name in dir(type(callback)) if name.startswith("on_") and name not in hooks]
    close = {name: get_close_matches(name, hooks, 1, 0.75) for name in own}
    return [
        f"nothing calls {type(callback).__name__}.{name}; did you mean {found[0]}?"
        for name, found in close.items()
        if found
    ]


def waits_for_validation(callback: Callback) -> bool:
    """Whether a callback of Lightning's acts at validations alone.

    Example:
        >>> waits_for_validation(EarlyStopping("val/loss"))
        True
    """
    if isinstance(callback, ModelCheckpoint):
        at_steps = callback._every_n_train_steps > 0 or callback._train_time_interval is not None
        return not at_steps and not callback._save_on_train_epoch_end
    return isinstance(callback, EarlyStopping) and not callback._check_on_train_epoch_end


def monitors(callback: Callback) -> str | None:
    """Return the name that a callback of Lightning's has to find among what is logged, if any."""
    if isinstance(callback, EarlyStopping):
        return callback.monitor if callback.strict else None
    return callback.monitor if isinstance(callback, ModelCheckpoint) else None


def check_monitors(callbacks: Sequence[Callback], no_validation: str | None) -> None:
    """Refuse callbacks that wait for a number that nothing logs, or for a validation.

    ``no_validation`` says why there is none. Names below ``train`` may be parts of a loss, and
    callbacks of the user's may log any: what such a run does not log is told later.

    Raises:
        ValueError: such a callback; the message says what to set.

    Example:
        >>> check_monitors([EarlyStopping("val/loss")], None)
    """
    known = {name for each in callbacks for name in getattr(each, "logs", ())}
    known |= {DiffusionModule.VALIDATION_LOSS} if no_validation is None else set()
    others = any(_may_log(each) for each in callbacks)
    for each in callbacks:
        told, monitor = f"trainer.callbacks: {type(each).__name__}", monitors(each)
        if isinstance(each, BestCheckpoints):
            continue
        if no_validation and (
            waits_for_validation(each) or monitor == DiffusionModule.VALIDATION_LOSS
        ):
            raise ValueError(
                f"{told} {f'monitors {monitor}' if monitor else 'saves'} at validations, "
                f"but {no_validation}"
            )
        if monitor is None or monitor in known or others or monitor.startswith("train/"):
            continue
        raise ValueError(
            f"{told} monitors {monitor}, which nothing logs; expected one of "
            f"{', '.join(sorted({'train/loss', *known}))}{nearest(monitor, known)}"
        )


def _may_log(callback: Callback) -> bool:
    """Whether nothing is known of what a callback logs."""
    lightnings = type(callback).__module__.startswith("lightning.")
    known = lightnings or is_ours(type(callback))
    return isinstance(callback, LearningRateMonitor) or not known


class Monitored(Callback):
    """Refuses a callback that monitors what nothing has logged, at the validation that needs it.

    Of one that looks at other times it warns at the end of a run, whose weights are of use.

    Raises:
        ValueError: a callback monitors one at a validation; those that there are, are named.

    Example::

        trainer = Trainer(callbacks=[EarlyStopping("val/loss"), Monitored()])
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let EarlyStopping say why it stopped only where it has stopped this run."""
        for each in trainer.early_stopping_callbacks:
            each.stopping_reason_message = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for what each one monitors, before the first of them does."""
        there = trainer.callback_metrics
        for each in _watching(trainer):
            if waits_for_validation(each) and monitors(each) not in there:
                raise ValueError(_not_logged(each, trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell which of them have watched nothing."""
        there = trainer.callback_metrics
        for each in _watching(trainer):
            name = monitors(each)
            if name is not None and name not in there and trainer.is_global_zero:
                print(
                    f"warning: trainer.callbacks: {type(each).__name__} monitors {name}, which "
                    f"nothing has logged: it has done nothing{nearest(name, there)}",
                    file=sys.stderr,
                )


@contextmanager
def telling_what_is_not_logged(trainer: Trainer) -> Iterator[None]:
    """Tell in a sentence, in place of Lightning's, that a callback monitors what nothing logs.

    Raises:
        ValueError: the callback, the names that there are, and those that are close.

    Example::

        with telling_what_is_not_logged(trainer):
            trainer.fit(module, datamodule=data)
    """
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        for each in _watching(trainer):
            name = monitors(each)
            # Lightning's two classes that monitor name themselves there.
            kind = EarlyStopping if isinstance(each, EarlyStopping) else ModelCheckpoint
            meant = all(told in str(error) for told in (str(name), kind.__name__))
            if meant and name not in trainer.callback_metrics:
                raise ValueError(_not_logged(each, trainer)) from error
        raise


def _not_logged(callback: Callback, trainer: Trainer) -> str:
    """Return that nothing has logged what a callback monitors, and what there is."""
    name, there = str(monitors(callback)), trainer.callback_metrics
    return (
        f"trainer.callbacks: {type(callback).__name__} monitors {name}, which nothing has logged "
        f"by step {trainer.global_step}; expected one of {', '.join(sorted(there))}"
        f"{nearest(name, there)}"
    )


def _watching(trainer: Trainer) -> list[Callback]:
    """Return the callbacks that have to find a number among what is logged."""
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in every if not isinstance(each, BestCheckpoints) and monitors(each)]


def training_flops(model: Model) -> int | None:
    """Return the floating-point operations of training on one image: three forwards.

    None where they cannot be counted.
    """
    flops = forward_flops(model)
    return None if flops is None else 3 * flops


def forward_flops(model: Model) -> int | None:
    """Return the floating-point operations of one image's pass through the network.

    Counted on a copy of the network, without memory where that can be. None where a network of
    one's own does not compute on a CPU.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        denoiser = build(model.description, to_fill=True).eval()
        with torch.device(denoiser.device):
            x = torch.empty(1, *denoiser.latent_shape)
            label, t = torch.zeros(1, dtype=torch.long), torch.zeros(1)
        try:
            with FlopCounterMode(display=False) as counter:
                denoiser.evaluate(x, t, label)
        except Exception:  # Whatever it needs a device for.
            if family_for(denoiser.network).weights_alone:
                raise
            return None
    return int(counter.get_total_flops())


def _due(trainer: Trainer, every_n_steps: int) -> bool:
    """Whether a step ends here, not only a part of its batch, whose turn it is."""
    accumulates = trainer.fit_loop.epoch_loop._should_accumulate()
    return not accumulates and trainer.global_step % every_n_steps == 0


class Speed(Callback):
    """Logs images/s over all ranks, memory and, where the device's peak is known, MFU.

    MFU = images/s times the operations of training on one image, over the peak of all devices at
    the trainer's precision. What drawing and validation take does not count as training.
    ``memory_gb`` is the most that PyTorch has held on the device of the first rank so far, on a CPU
    what the process has.

    Example::

        trainer = Trainer(callbacks=[Speed(every_n_steps=50)])
    """

    logs = ("images/s", "mfu", "memory_gb")
    """Names of what it logs, which others can monitor."""

    def __init__(self, every_n_steps: int = 50) -> None:
        self._every = every_n_steps
        self._images = 0
        self._since = self._paused = self._drawn = 0.0
        self._flops: int | None = None
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count operations and look the peak up."""
        self._peak = peak_flops(pl_module.device, str(trainer.precision))
        if self._peak and isinstance(pl_module, DiffusionModule):
            self._flops = training_flops(pl_module.model)
        self._begin(pl_module)

    def _begin(self, module: LightningModule) -> None:
        self._images, self._since = 0, time.perf_counter()
        self._drawn = getattr(module, "seconds_drawing", 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Log the speed of the last so many steps."""
        self._images += len(batch[1]) * trainer.world_size
        if not _due(trainer, self._every):
            return
        drawing = getattr(pl_module, "seconds_drawing", 0.0) - self._drawn
        rate = self._images / (time.perf_counter() - self._since - drawing)
        pl_module.log("images/s", rate)
        if self._peak and self._flops is not None:
            pl_module.log("mfu", rate * self._flops / (self._peak * trainer.world_size))
        held = most_memory(pl_module.device)
        if held is not None:
            pl_module.log("memory_gb", held / 1e9)
        self._begin(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on as if no time had passed."""
        self._since += time.perf_counter() - self._paused


def most_memory(device: torch.device) -> int | None:
    """Return the most bytes that were held on a device so far; on a CPU by this process.

    None where nobody keeps count. Asking does not wait for the device.
    """
    if device.type in ("cuda", "xpu"):
        return int(torch.accelerator.max_memory_allocated(device))
    if device.type != "cpu" or resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


class LossByLevel(Callback):
    """Logs the mean loss in equal parts of the process, over all ranks, between two log entries.

    Example::

        trainer = Trainer(callbacks=[LossByLevel(every_n_steps=50)])
    """

    # Names of what it logs, which others can monitor.
    logs = tuple(f"loss_by_level/{part + 1}_of_{BINS}" for part in range(BINS))

    def __init__(self, every_n_steps: int = 50) -> None:
        self._every = every_n_steps
        self._sums = torch.zeros(2, BINS)
        """Total and count per part, on the device of the losses, so that nothing waits for it."""
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer, which knows the other ranks."""
        self._trainer = trainer

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add a batch, and log now and then."""
        if not isinstance(pl_module, DiffusionModule) or pl_module.last_losses is None:
            return
        losses = pl_module.last_losses
        process = pl_module.denoiser.process
        t = torch.as_tensor(losses.level.t, dtype=torch.float32)
        edges = process.time_at(torch.arange(1, BINS) / BINS).float().to(t.device)
        place = torch.bucketize(t, edges, right=True)
        self._sums = self._sums.to(t.device)
        self._sums[0].index_add_(0, place, losses.per_image.detach().float())
        self._sums[1].index_add_(0, place, torch.ones_like(t))
        if not _due(trainer, self._every):
            return
        for name, (total, count) in zip(self.logs, self._over_ranks().T.tolist(), strict=True):
            if count:
                pl_module.log(name, total / count)
        self._sums.zero_()

    def _over_ranks(self) -> torch.Tensor:
        """Return the sums of all ranks, all of which have to ask."""
        if self._trainer is None or self._trainer.world_size == 1:
            return self._sums
        # In place where ranks are joined.
        summed = self._trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
        assert isinstance(summed, torch.Tensor)
        return summed

    def state_dict(self) -> dict[str, Any]:
        """Return what is not logged yet, of all ranks."""
        return {"sums": self._over_ranks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it, on the first rank, since the sums are added up over ranks."""
        first = self._trainer is None or self._trainer.is_global_zero
        self._sums = state_dict["sums"] if first else torch.zeros_like(state_dict["sums"])


class RatesAndNorms(Callback):
    """Logs the learning rate of each parameter group at a step, and the norm of all weights.

    The rate is ``train/lr``; of several groups ``train/lr/NAME`` or, without a name, their number.
    ``train/weight_norm`` is the norm sqrt(sum of squares) of all that the optimiser trains, after
    the step.

    Example::

        trainer = Trainer(callbacks=[RatesAndNorms(every_n_steps=50)])
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self._every = every_n_steps
        self._rates: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read the rates, which a schedule changes at the end of the step."""
        if (trainer.global_step + 1) % self._every:
            return
        groups = optimizer.param_groups
        names = [str(group.get("name", place)) for place, group in enumerate(groups)]
        keys = [f"train/lr/{name}" for name in names] if len(groups) > 1 else ["train/lr"]
        self._rates = {key: float(group["lr"]) for key, group in zip(keys, groups, strict=True)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log them if it is time."""
        if not _due(trainer, self._every):
            return
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        for (name, rate), group in zip(self._rates.items(), groups, strict=False):
            # Those that warm up by themselves, as the schedule-free ones do, say so at the step.
            pl_module.log(name, float(group.get("scheduled_lr", rate)))
        trained = [
            weight.detach()
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
        ]
        norm = torch.nn.utils.get_total_norm(trained)
        pl_module.log(
            "train/weight_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm
        )


class Previews(Callback):
    """Draws the same few images now and then with the averaged weights, unguided and guided.

    ``previews/step-N.png`` holds a column per class: the upper row is unguided. With Weights &
    Biases the pairs are also a table of images, and TensorBoard gets the picture, as does any other
    logger that has Lightning's ``log_image(key, images, step)``.

    Example::

        previews = Previews("outputs/train/photos-1f3a", every_n_steps=1000, guidance=[SAG(0.5)])
        trainer = Trainer(callbacks=[previews])
    """

    def __init__(
        self,
        out: str | Path,
        every_n_steps: int,
        classes: Sequence[int | str] | None = None,
        guidance: Sequence[Term] = (),
        steps: int = 20,
        seed: int = 0,
    ) -> None:
        self._out = Path(out) / "previews"
        self._every, self._classes, self._seed = every_n_steps, classes, seed
        self._guidance, self._steps = tuple(guidance), steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Draw if it is time; all ranks do, since sharded weights need them all."""
        if _due(trainer, self._every) and isinstance(pl_module, DiffusionModule):
            self.draw(trainer, pl_module, trainer.global_step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be drawn, before the first step."""
        if isinstance(pl_module, DiffusionModule):
            _, settings = self._plan(pl_module.model)
            settings.check(pl_module.model)

    def _plan(self, model: Model) -> tuple[list[Request], Settings]:
        names = model.class_names
        labels = labels_of(self._classes or list(range(min(8, len(names)))), names)
        requests = [Request(i, self._seed, label, i) for i, label in enumerate(labels)]
        settings = Settings.of(
            model, steps=self._steps, guidance=self._guidance, batch_size=len(requests)
        )
        return requests, settings

    def draw(self, trainer: Trainer, module: DiffusionModule, step: int) -> None:
        """Draw and keep the pairs."""
        with module.model_to_draw_with() as model:
            names = model.class_names
            requests, settings = self._plan(model)
            drawn = draw_batch(model, requests, settings, twins=range(len(requests)))
        guided = drawn.images.cpu()
        unguided = torch.stack([drawn.twins[i].cpu() for i in range(len(requests))])
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._out.mkdir(parents=True, exist_ok=True)
        grid = make_grid(torch.cat([unguided, guided]), nrow=len(requests), padding=1)
        picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
        scale = max(1, 64 // unguided.shape[-1])
        picture = picture.resize(
            (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
        )
        with atomic(self._out / f"step-{step:08d}.png") as temporary:
            picture.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("previews", grid, step - 1)  # as its numbers
            elif isinstance(logger, WandbLogger):
                rows = [
                    [names[r.label], *_wandb_images(unguided[i], guided[i])]
                    for i, r in enumerate(requests)
                ]
                columns = ["class", "unguided", "guided"]
                logger.log_table("previews", columns=columns, data=rows, step=step)
            elif hasattr(logger, "log_image"):
                logger.log_image("previews", [picture], step=step - 1)


def _wandb_images(*images: torch.Tensor) -> list[Any]:
    import wandb

    return [wandb.Image(image.permute(1, 2, 0).squeeze().numpy()) for image in images]


class TrackMetrics(Callback):
    """Draws the same requests every ``every_n_steps`` steps on all ranks, and logs their metrics.

    They are drawn with the averaged weights where there are any, logged as ``metrics/NAME``, and
    left for checkpoint callbacks to monitor. Nothing of the training's own randomness is used.

    Raises:
        ValueError: no positive number of steps, or fewer than two requests.

    Example::

        track = TrackMetrics(suite, requests, settings, every_n_steps=1000)
        trainer = Trainer(callbacks=[track])
    """

    def __init__(
        self, suite: Suite, requests: Sequence[Request], settings: Settings, every_n_steps: int
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"track.every_n_steps={every_n_steps}: expected 1 or more")
        if len(requests) < 2:
            raise ValueError(f"track.num_images={len(requests)}: expected 2 or more")
        self._suite, self._every = suite, every_n_steps
        self.logs = [f"metrics/{name}" for name in suite.metrics]
        self._requests, self._settings = list(requests), settings

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure if it is time."""
        if not _due(trainer, self._every):
            return
        if not isinstance(pl_module, DiffusionModule):
            raise TypeError(f"{type(pl_module).__name__} cannot draw; expected a DiffusionModule")
        found = self.measure(trainer, pl_module)
        values = {f"metrics/{name}": value for name, value in found.items()}
        # To the loggers directly: these steps need not be those at which training is logged.
        for name, value in values.items():
            pl_module.log(name, value, logger=False, rank_zero_only=False)
        for logger in trainer.loggers:
            # As Lightning numbers steps, from 0: a run that goes on from here keeps the row.
            logger.log_metrics(values, step=trainer.global_step - 1)

    def measure(self, trainer: Trainer, module: DiffusionModule) -> dict[str, float]:
        """Draw, and return the metrics of all ranks' images; every rank has to call this."""
        suite = self._suite.to(module.device)
        suite.reset()
        rank, world = trainer.global_rank, trainer.world_size
        with module.model_to_draw_with() as model:
            for batch in drawn(model, self._requests, self._settings, rank=rank, world=world):
                suite.update(batch.images, batch.indices)
        return suite.compute()


def best_by(metric: str, out: Path, every_n_steps: int) -> BestCheckpoints:
    """Return a callback that keeps the checkpoint with the best value of a tracked metric."""
    mode = "max" if metric_kind(metric).higher_is_better else "min"
    return best_checkpoint(out, f"metrics/{metric}", f"best-{metric}", mode, every_n_steps)
