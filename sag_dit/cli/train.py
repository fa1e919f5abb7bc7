"""``train.py``: train a denoiser and leave a run folder that ``sample.py`` reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.app import alone_in, fail, launch, quiet_lightning
from sag_dit.cli.composing import (
    arguments_of,
    check_target,
    config_folder,
    fitted,
    make,
    make_around,
    named_by,
    placed,
    taken_by,
)
from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import keys_of, mapping_of, to_dict
from sag_dit.cli.run_identity import (
    begin_from,
    changeable,
    changes,
    check_schedule,
    claim_data,
    go_on_as_begun,
    identity,
    note_changes,
    release,
    run_folder,
    told_differences,
)
from sag_dit.cli.trainer_flags import check_training
from sag_dit.cli.values import as_callable, check_logger, make_terms
from sag_dit.untrusted import TARGET, read_yaml

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData
    from sag_dit.training.finetune import LoRA
    from sag_dit.training.going_on import Adopts, Parent
    from sag_dit.training.module import DiffusionModule
    from sag_dit.training.objective import Objective
    from sag_dit.training.optimizers import MakeOptimizer


def refuse_foreign_sizes(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments; refuse sizes of a DiT that the network which they name does not take.

    What files fill in of these is left out by itself.
    """
    typed = dict(each.lstrip("+").partition("=")[::2] for each in arguments)
    target = typed.get(f"model.{TARGET}", "")
    taken = _taken(target) if target else None
    if taken is not None:
        stated = {"patch_size": ["patch_size"]} if typed.get("patch_size", "null") != "null" else {}
        size = config_folder() / "size" / f"{typed.get('size')}.yaml"
        if size.is_file():
            stated["size"] = list(read_yaml(size))
        for key, names in stated.items():
            if not {*taken}.intersection(names):
                fail(
                    f"{key}={typed[key]}: {target} takes no {' or '.join(names)}; leave {key} out, "
                    f"and set what it takes as model.NAME"
                )
    return list(arguments)


def _taken(target: str) -> Collection[str] | None:
    """Return what a class takes by name, None of one that takes anything or cannot be imported."""
    try:
        return taken_by(target)
    except Exception:  # What is wrong with its file is told when it is made.
        return None


def make_model(config: Train, data: StepData) -> Model:
    """Build a fresh model of the configured size for the data's classes.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    from sag_dit.checkpoints import build, from_denoiser
    from sag_dit.checkpoints.loading import find_codec
    from sag_dit.codec import VAECodec
    from sag_dit.data.crop import sides, told_size

    if config.num_heads is not None:
        raise ValueError(
            f"num_heads={config.num_heads}: of the checkpoint that ckpt names; a fresh model has "
            f"model.num_heads={config.num_heads}"
        )
    if config.lora is not None or config.freeze:
        raise ValueError("lora and freeze are for a model that ckpt names: leave them out")
    if config.finetune.weights != "average" or config.finetune.optimizer:
        raise ValueError("finetune.weights and .optimizer are for a model that ckpt names")
    if config.model is None or config.resolution is None or config.patch_size is None:
        raise ValueError(
            "a fresh model needs model, resolution and patch_size: expected none of them null; "
            "size=S, B, L or XL fills model"
        )
    # Its autoencoder, and what of the images' side the network and that divide.
    settings, takes = network_settings(config.model)
    vae = config.vae or data.vae
    codec = find_codec(vae)
    patch = config.patch_size if takes is None or "patch_size" in takes else 1
    cell = codec.factor * patch
    height, width = sides(config.resolution)
    if height % cell or width % cell:
        raise ValueError(
            f"resolution={told_size(config.resolution)}: expected a multiple of {cell}, the "
            f"autoencoder's factor {codec.factor} times patch_size={patch}"
        )
    # The sizes of x_t, and the classes, as far as the network takes them.
    latent = isinstance(codec, VAECodec)
    channels = codec.latent_channels if isinstance(codec, VAECodec) else data.channels
    grid = [height // codec.factor, width // codec.factor]
    side = grid[0] if height == width else grid
    names = list(data.class_names)
    num_classes = config.num_classes or len(names)
    sizes = {"input_size": side, "in_channels": channels, **settings, "num_classes": num_classes}
    settings |= {name: value for name, value in sizes.items() if takes is None or name in takes}
    # The model, described as a checkpoint describes it.
    description = {
        "model": settings,
        "process": to_dict(config.process),
        "kind": config.kind,
        "x_0_range": None if latent else [-1.0, 1.0],
        "class_names": names if len(names) == num_classes else [],
    }
    denoiser, name = build(description), str(config.name)
    shape = (channels, *grid)
    if TARGET in settings and denoiser.latent_shape != shape:
        raise ValueError(
            f"model.{TARGET}={settings[TARGET]}: its x_t is {denoiser.latent_shape}: expected "
            f"{shape}, that of the data at resolution={told_size(config.resolution)}"
        )
    defaults = to_dict(config.sampling)
    return from_denoiser(denoiser, name, codec=codec, defaults=defaults, vae=vae)


def network_settings(
    model: Mapping[str, Any],
) -> tuple[dict[str, Any], Collection[str] | None]:
    """Return a network's settings, and the names of its arguments where they are its class's own.

    Raises:
        ValueError: an argument that it does not take, or no class of that name.
    """
    hint, told = keys_of(Train)["model"]
    declared = keys_of(mapping_of(hint, told))
    # Null is what only the other kind of network takes.
    stated = {name: value for name, value in model.items() if value is not None}
    if TARGET in stated:
        _, given = check_target(stated, "model")
        takes: Collection[str] | None = arguments_of(stated[TARGET])
        if takes is None:
            takes = named_by(stated[TARGET]) or None
        return {TARGET: stated[TARGET], **given}, takes
    own = {name: value for name, value in stated.items() if name not in declared}
    return stated | fitted(own, "model", told.asks()), None


def load_base(config: Train) -> tuple[Model, Train]:
    """Load the model to fine-tune; return the configuration with it, whose resolution follows.

    That is ``resolution``, if null, and ``data.size``.

    Raises:
        ValueError: the checkpoint cannot be loaded, its weights are NaN or infinite, or a key is
            set that it determines.
    """
    from sag_dit.checkpoints import load
    from sag_dit.checkpoints.export import check_finite
    from sag_dit.training.finetune import resolution_of

    determined = (key for key, (_, told) in keys_of(Train).items() if told.by_checkpoint)
    stated = [key for key in determined if getattr(config, key) is not None]
    if stated:
        raise ValueError(
            f"ckpt={config.ckpt} determines {', '.join(stated)}: expected null; choose "
            f"experiment=finetune, which leaves these to the checkpoint and the data"
        )
    lora_settings(config)  # Before a checkpoint is downloaded.
    weights = config.finetune.weights
    ema = weights == "average" if isinstance(weights, str) else weights
    _one_side(config)
    base = load(str(config.ckpt), ema=ema, vae=config.vae, num_heads=config.num_heads)
    check_finite(base.class_conditional.network.state_dict(), f"ckpt={config.ckpt}")
    side = _one_side(config) or resolution_of(base)
    data = {**config.data, "size": side} if "size" in config.data else config.data
    return base, replace(config, resolution=side, data=data)


def _one_side(config: Train) -> int | None:
    """Return the resolution to fine-tune at, which is that of squares.

    Raises:
        ValueError: it is one of rectangles.
    """
    if isinstance(config.resolution, list):
        raise ValueError(
            f"resolution={config.resolution}: a checkpoint is fine-tuned on squares: expected one "
            f"number; rectangles are trained from scratch, without ckpt"
        )
    return config.resolution


def lora_settings(config: Train) -> LoRA | None:
    """Return what adapters to train, None for the weights themselves.

    Raises:
        ValueError: a value is out of its range, or peft is not installed.
    """
    from sag_dit.training.finetune import LoRA

    if config.lora is None:
        return None
    if config.lora.rank is None:
        if config.lora.alpha is not None:
            raise ValueError(
                f"lora.alpha={config.lora.alpha}: scales adapters, and lora.rank=null trains none: "
                f"expected lora.rank=8 or another beside it, or no lora.alpha"
            )
        return None
    return LoRA(**to_dict(config.lora))


def adapt_model(config: Train, base: Model, data: StepData) -> tuple[Model, str, Collection[str]]:
    """Make a loaded model fit the data, and return it with the report of what was done.

    The names are those of parameters that were made anew.

    Raises:
        ValueError: the data does not fit, or a pattern to freeze or to adapt matches nothing.
    """
    from sag_dit.models import family_for
    from sag_dit.training.finetune import (
        adapt,
        adaptation_report,
        add_adapters,
        freeze,
        resolution_of,
    )

    side = _one_side(config) or resolution_of(base)
    adapted = adapt(base, str(config.name), data.class_names, side)
    network = adapted.model.class_conditional.network
    frozen = freeze(network, config.freeze or ())
    lora = lora_settings(config)
    if lora is None:
        return adapted.model, adaptation_report(base, adapted), adapted.remade
    tables = family_for(network).label_tables(network)
    layers = add_adapters(network, lora, frozen)
    # New classes have no rows but those that are learned now.
    for table in tables.keys() & dict(network.named_parameters()).keys():
        learned = table in adapted.remade and table not in frozen
        network.get_parameter(table).requires_grad_(learned)
    report = adaptation_report(base, adapted, layers)
    return replace(adapted.model, lora=lora.description), report, adapted.remade


def make_optimizer(config: Train) -> MakeOptimizer:
    """Return what makes the optimiser of parameters.

    Raises:
        ValueError: its package is missing, or it takes no such argument.
    """
    from torch.optim import Optimizer

    from sag_dit.training.optimizers import missing

    missing(str(config.optimizer.get("_target_")))
    made: MakeOptimizer = make({**config.optimizer, "_partial_": True}, "optimizer", Optimizer)
    return made


def check_optimizer(config: Train) -> None:
    """Refuse an optimiser that cannot be made or used, and rules that are none, before all else.

    Raises:
        ValueError: the reason is told.
    """
    from torch.optim.lr_scheduler import LRScheduler

    from sag_dit.training.optimizers import check_alone, stand_in
    from sag_dit.training.param_groups import rules_of

    schedule = config.schedule
    made = make(schedule, "schedule", LRScheduler) if schedule else None
    further = (*config.ema.further.decays, *config.ema.further.sigma_rel)
    check_alone(stand_in(make_optimizer(config)), made, config.ema.decay, further)
    rules_of(make_rules(config))


def make_rules(config: Train) -> list[Any]:
    """Return the entries of ``param_groups``; those with ``_target_`` are made."""
    rules = []
    for place, entry in enumerate(config.param_groups or []):
        where = f"param_groups[{place}]"
        named = isinstance(entry, Mapping) and "_target_" in entry
        rules.append(make(as_callable(entry, where), where) if named else entry)
    return rules


def make_module(config: Train, model: Model) -> DiffusionModule:
    """Build what trains the model."""
    from torch.optim.lr_scheduler import LRScheduler

    from sag_dit.training.averaging import Further
    from sag_dit.training.finetune import default_objective
    from sag_dit.training.module import DiffusionModule
    from sag_dit.training.objective import Objective

    wanted, schedule = config.objective, config.schedule
    denoiser = model.class_conditional.train()
    denoiser.network.checkpoint_blocks = config.checkpoint_blocks
    if config.compile:
        denoiser.network.compile_blocks()
    return DiffusionModule(
        model,
        objective=make(wanted, "objective", Objective) if wanted else default_objective(denoiser),
        optimizer=make_optimizer(config),
        param_groups=make_rules(config),
        schedule=make(schedule, "schedule", LRScheduler) if schedule else None,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        further=Further(config.ema.further.decays, config.ema.further.sigma_rel),
        max_skipped=config.max_skipped,
        seed=config.seed,
    )


def check_resuming(config: Train) -> None:
    """Refuse what cannot be taken over from another run, before anything is loaded.

    Raises:
        ValueError: a key that goes with ``resume_from`` alone, or one that it does not go with.
    """
    if config.resume_from is None:
        if not config.resume_optimizer or config.resume_schedule != "continued":
            raise ValueError("resume_optimizer and resume_schedule are for resume_from: set it too")
        return
    where, path = f"resume_from={config.resume_from}", Path(config.resume_from).expanduser()
    if config.finetune.optimizer:
        raise ValueError(f"{where}: takes the optimiser's state itself; leave finetune.optimizer")
    places = (path.resolve(), *path.resolve().parents)
    if config.out is not None and Path(config.out).resolve() in places:
        raise ValueError(
            f"{where}: that is the run in out={config.out} itself, which goes on by its own "
            f"command; leave resume_from out, or choose another out"
        )


def parent_of(config: Train) -> Parent | None:
    """Return the checkpoint whose optimiser's state, and perhaps weights and step, are taken over.

    Raises:
        ValueError: there is none, or it is not before the end of this run.
    """
    from sag_dit.checkpoints.zoo import locate
    from sag_dit.training.going_on import find_parent

    if config.resume_from is None:
        if not config.finetune.optimizer:
            return None
        return find_parent(locate(str(config.ckpt)).path, "finetune.optimizer=true")
    where = f"resume_from={config.resume_from}"
    parent = find_parent(Path(config.resume_from).expanduser(), where)
    if parent.step >= config.max_steps:
        raise ValueError(
            f"max_steps={config.max_steps}: expected more than {parent.step}, the step of {where}, "
            f"since steps are counted on"
        )
    return parent


def adopting(config: Train, parent: Parent, out: Path, anew: Collection[str]) -> Adopts:
    """Return what writes the first checkpoint of a run that takes over another one's state.

    Parameters ``anew`` of the network have no state to take over.
    """
    from sag_dit.training.going_on import Adopts

    if config.resume_from is None:
        where = "finetune.optimizer=true"
        return Adopts(parent, out, step=0, past=0, weights=False, anew=anew, where=where)
    return Adopts(
        parent,
        out,
        step=parent.step,
        past=parent.step if config.resume_schedule == "continued" else 0,
        optimizer=config.resume_optimizer,
        where=f"resume_from={config.resume_from}",
    )


def check_objective(objective: Objective, data: StepData, config: Train) -> None:
    """Refuse an objective that sees pixels without data that has them, and the reverse.

    Raises:
        ValueError: one is stated without the other.
    """
    from sag_dit.training.objective.base import no_pixels

    if objective.sees_pixels and not data.gives_pixels:
        raise no_pixels(objective)
    images = config.data.get("images")
    if images is not None and not objective.sees_pixels:
        raise ValueError(
            f"data.images={images}: {type(objective).__name__} does not see pixels: expected null, "
            f"or an objective whose losses take pixels"
        )


def check_validated(config: Train, data: StepData, trainer: Trainer) -> bool:
    """Return whether a run validates; refuse what waits for a loss on held-out images in vain.

    Raises:
        ValueError: a callback that monitors it, or checkpoints by it, where there is none.
    """
    from sag_dit.training.resume import BestCheckpoints

    limit = config.trainer.get("limit_val_batches")
    if limit != 0 and data.validates:
        return True
    why = "no image is held out" if limit != 0 else "trainer.limit_val_batches is 0"
    if config.keep.best > 1:
        raise ValueError(
            f"keep.best={config.keep.best}: {why}, so that there is no val/loss to choose them by: "
            f"expected 0, or held-out images, such as data.held_out=0.1"
        )
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = str(getattr(each, "monitor", None))
        if monitor.startswith("val/") and not isinstance(each, BestCheckpoints):
            raise ValueError(
                f"trainer.callbacks: {type(each).__name__} monitors {monitor}, but {why}: expected "
                f"held-out images, such as data.held_out=0.1, or another number"
            )
    return False


def check_previews(config: Train, model: Model) -> None:
    """Refuse guidance of the previews that the model cannot have, before a folder is claimed.

    Raises:
        ValueError: the reason, and the key that leaves it out.
    """
    from sag_dit.api import with_models

    terms = with_models(make_terms(config.preview.guidance, "preview.guidance"))
    for name, term in terms.items():
        try:
            if not term.off:
                term.check(model.denoiser)
        except ValueError as error:
            key = f"preview.guidance.{name}"
            raise ValueError(f"{key}: {error}; of the previews alone: {key}=null") from error


def listed(value: Any) -> list[Any]:
    """Return what may stand alone, or be left out, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, Mapping) else list(value)


def loggers_of(config: Train) -> dict[str, Mapping[str, Any]]:
    """Return the settings of all loggers by the keys at which they stand."""
    further = listed(config.trainer.get("logger"))
    named = {f"trainer.logger[{place}]": each for place, each in enumerate(further)}
    return ({"logger": config.logger} if config.logger else {}) | named


def make_loggers(config: Train, out: Path, step: int) -> list[Logger]:
    """Build the loggers; at a step they go on with what the run has logged before."""
    from lightning.pytorch.loggers import Logger

    from sag_dit.training.loggers import going_on

    return [
        make({**going_on(str(settings.get("_target_")), out, step), **settings}, where, Logger)
        for where, settings in loggers_of(config).items()
    ]


def own_callbacks(config: Train) -> list[Callback]:
    """Build the user's callbacks.

    Raises:
        ValueError: one is no callback, or two keep their state under one name.
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden

    made: list[Callback] = []
    for place, settings in enumerate(listed(config.trainer.get("callbacks"))):
        where = f"trainer.callbacks[{place}]"
        each = make(settings, where, Callback)
        twins = [there for there in made if there.state_key == each.state_key]
        if twins and is_overridden("state_dict", each, parent=Callback):
            raise ValueError(
                f"{where}: a second {type(each).__name__} keeps its state in checkpoints under the "
                f"name of the first, {each.state_key}: expected one, or a property state_key that "
                f"tells them apart"
            )
        made.append(each)
    return made


def own_plugins(config: Train) -> list[Any]:
    """Build the user's plugins.

    Raises:
        ValueError: one would take the place of what a run needs.
    """
    from lightning.pytorch.plugins import CheckpointIO, Precision

    made = []
    for place, settings in enumerate(listed(config.trainer.get("plugins"))):
        where = f"trainer.plugins[{place}]"
        each = make(settings, where) if isinstance(settings, Mapping) else settings
        name = type(each).__name__
        if isinstance(each, CheckpointIO):
            raise ValueError(
                f"{where}: {name} would write checkpoints in place of the run's own writer, which "
                f"leaves none half written when it is killed: leave it out"
            )
        if isinstance(each, Precision) and config.trainer.get("precision") is not None:
            raise ValueError(
                f"{where}: {name} is a precision beside trainer.precision="
                f"{config.trainer['precision']}: expected trainer.precision=null with it"
            )
        made.append(each)
    return made


def check_batches(flags: Mapping[str, Any]) -> None:
    """Refuse a number of batches that is no whole number of steps, since the last would be small.

    Raises:
        ValueError: it is no multiple of ``trainer.accumulate_grad_batches``.
    """
    each = flags.get("accumulate_grad_batches") or 1
    for name in ("limit_train_batches", "overfit_batches"):
        stated = flags.get(name)
        if isinstance(stated, int) and stated % each:
            raise ValueError(
                f"trainer.{name}={stated}: a step has trainer.accumulate_grad_batches={each} "
                f"batches; expected a multiple of it, such as {-(-stated // each) * each}"
            )


def make_trainer(config: Train, out: Path) -> Trainer:
    """Build Lightning's Trainer with what watches, saves and stops a run; loggers come later.

    Raises:
        ValueError: a term of the previews is none.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar

    from sag_dit.api import with_models
    from sag_dit.training.averaging import Snapshots
    from sag_dit.training.callbacks import (
        LossByLevel,
        Monitored,
        Previews,
        RatesAndNorms,
        Speed,
        check_callbacks,
    )
    from sag_dit.training.console import Progress, on_a_terminal
    from sag_dit.training.resume import AtomicCheckpointIO, LastCheckpoints, best_checkpoint

    every, keep, preview = config.every_n_steps, config.keep, config.preview
    log = min(every.log, config.max_steps)  # So that a short run logs its end.
    classes: Any = preview.classes or None
    own, flags = own_callbacks(config), config.trainer
    epochs = "limit_train_batches" in flags or bool(flags.get("overfit_batches"))
    check_callbacks(own, epochs=epochs)
    has_bar = any(isinstance(each, ProgressBar) for each in own)
    shows_bar = config.trainer.get("enable_progress_bar", True) and (has_bar or on_a_terminal())
    callbacks: list[Callback] = [
        # First, so that it speaks before the others ask.
        Monitored(),
        *own,
        Speed(log),
        LossByLevel(log),
        RatesAndNorms(log),
        Previews(
            out,
            every.preview,
            classes,
            tuple(with_models(make_terms(preview.guidance, "preview.guidance")).values()),
            preview.steps,
            config.seed,
        ),
        *([Progress()] if shows_bar and not has_bar else []),
        # Last, so that what they save is what the others have seen.
        Snapshots(out, every.snapshot, keep.snapshots),
        *([best_checkpoint(out, most=keep.best)] if keep.best else []),
        LastCheckpoints(out, every.checkpoint, keep.last, config.every_n_minutes.checkpoint),
    ]
    stated = {
        **{
            name: each
            for name, each in config.trainer.items()
            if name not in ("logger", "callbacks")
        },
        "enable_progress_bar": shows_bar,
        "plugins": own_plugins(config),
    }
    trainer: Trainer = make(
        {"enable_model_summary": False, "num_sanity_val_steps": 0, **stated},
        "trainer",
        Trainer,
        max_steps=config.max_steps,
        # Lightning makes it one beside min_steps, and a run has no epochs.
        min_epochs=0,
        logger=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=log,
        # Lightning counts batches here.
        val_check_interval=every.validation * config.trainer.get("accumulate_grad_batches", 1),
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        default_root_dir=out,
    )
    return trainer


def go_on_training(
    config: Train,
    trainer: Trainer,
    module: DiffusionModule,
    data: StepData,
    checkpoint: Path | None,
    step: int,
) -> None:
    """Train from a checkpoint's step on, on all ranks, and export the weights."""
    from sag_dit.cli.stopping import ending_together, naming_lost_nodes
    from sag_dit.training.console import Lines
    from sag_dit.training.resume import export_run

    out = Path(trainer.default_root_dir)
    trainer.loggers = make_loggers(config, out, step)
    if config.trainer.get("enable_progress_bar", True) and trainer.progress_bar_callback is None:
        trainer.loggers = [*trainer.loggers, Lines(trainer)]
    for logger in trainer.loggers:
        logger.log_hyperparams(to_dict(config))
    with ending_together(trainer), naming_lost_nodes(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        export_run(trainer, module, out)
    if trainer.is_global_zero and trainer.global_step < config.max_steps:
        print(
            f"saved at step {trainer.global_step} of {config.max_steps}, where the trainer was "
            f"told to stop; repeat the command to go on"
        )


def disk_report(config: Train, module: DiffusionModule, validates: bool) -> str:
    """Return in a line how much of the disk a run takes at most."""
    sizes = {id(each): each.numel() * each.element_size() for each in module.state_dict().values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    # What Adam holds: two numbers for each that is trained.
    checkpoint = sum(sizes.values()) + 2 * sum(p.numel() * p.element_size() for p in trained)
    keep, widths = config.keep, config.ema.further.sigma_rel
    network = sum(p.numel() * p.element_size() for p in module.denoiser.parameters())
    number = min(keep.snapshots, -(-config.max_steps // config.every_n_steps.snapshot))
    # While a checkpoint is written, the one that it replaces is there as well.
    best = keep.best * validates
    total = (keep.last + best + 1) * checkpoint + number * len(widths) * network
    snapshots = f", {number} snapshots of {len(widths)} averages" if widths else ""
    return (
        f"disk: at most {total / 1e6:,.1f} MB for {keep.last} last and {best} best "
        f"checkpoints of {checkpoint / 1e6:,.1f} MB{snapshots}"
    )


def run_train(config: Train) -> None:
    """Train, and export the weights that are to be sampled with."""
    check_resuming(config)
    if config.ckpt is None and config.model is None:
        raise ValueError(
            "ckpt is not set: expected what to fine-tune, such as ckpt=DiT-XL-2 or a run's folder"
        )
    quiet_lightning()
    import torch

    from sag_dit.cli.tracking import trackers
    from sag_dit.output.claim import claim
    from sag_dit.training.optimizers import check_steps
    from sag_dit.training.resume import FOLDER, exported_step, newest_checkpoint, steps_of
    from sag_dit.training.start import start_report

    # The folder follows from what determines the weights, a checkpoint's resolution included.
    check_training(config.trainer, config.max_steps)
    check_batches(config.trainer)
    for where, each in loggers_of(config).items():
        check_logger(each, where)
    check_optimizer(config)
    base = None
    if config.ckpt:
        base, config = load_base(config)
    out = run_folder(to_dict(config))
    config = placed(go_on_as_begun(config, out), out)
    # The data, and a model that fits it.
    torch.set_float32_matmul_precision(config.matmul)
    torch.manual_seed(config.seed)
    data: StepData = make_around(config.data, "data", keys_of(Train)["data"][1].around)
    told = ""
    anew: Collection[str] = ()
    if base is None:
        model = make_model(config, data)
    else:
        model, told, anew = adapt_model(config, base, data)
    data.check(model)
    module = make_module(config, model)
    check_objective(module.objective, data, config)
    check_previews(config, model)
    trainer = make_trainer(config, out)
    validates = check_validated(config, data, trainer)
    check_steps(make_optimizer(config), module.groups(), trainer.strategy.root_device)
    device, at_previews = trainer.strategy.root_device, config.every_n_steps.preview
    tracked = trackers(config.track, model, out, device, at_previews)
    trainer.callbacks[:0] = tracked  # type: ignore[attr-defined]
    data.rank_batch_size(trainer.world_size)
    begun = bool(steps_of(out / FOLDER))
    parent = None if begun else parent_of(config)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
        if trainer.is_global_zero:
            ran = f"{trainer.global_step} step{'s' * (trainer.global_step != 1)}"
            print(f"fast_dev_run: {ran} ran and validated; nothing is kept")
        return
    # The folder is claimed, and a run that was begun there goes on.
    settings = to_dict(config)
    out.mkdir(parents=True, exist_ok=True)
    check_schedule(settings, out)
    changed = changes(settings, out)
    remedy = f", or begin another run from it: resume_from={out}"
    claim(out, identity(settings), settings, "a run", remedy * begun, changeable())
    with alone_in(out):
        if trainer.is_global_zero:
            claim_data(out, data.fingerprint(), on_purpose=config.changed_data)
        checkpoint, step = newest_checkpoint(out, module)
        if trainer.is_global_zero:
            note_changes(out, changed, step)
        if checkpoint is None:  # Also where none of those that there are can be read.
            parent = parent or parent_of(config)
        if parent is not None:
            adopts = adopting(config, parent, out, anew)
            trainer.callbacks.insert(0, adopts)  # type: ignore[attr-defined]
            checkpoint, step = adopts.file, adopts.step
        finished = step >= config.max_steps and exported_step(out) == step
        if finished:
            told = f"finished at step {step}: nothing is left to train; a larger max_steps goes on"
        elif trainer.is_global_zero:
            images, epoch = data.batch_size, len(data.training_images)
            lines = [
                told,
                data.report(),
                start_report(module, trainer, images, step, epoch),
                module.groups_report(),
                disk_report(config, module, validates),
            ]
            if parent is not None and config.resume_from is not None:
                begin_from(out, parent.folder, parent.step)
                lines.append(told_differences(out, parent.folder, parent.step))
            told = "\n".join(filter(None, lines))
        if told and trainer.is_global_zero:
            print(told)
        if not finished:
            try:
                go_on_training(config, trainer, module, data, checkpoint, step)
            except ValueError:
                # What could not be taken over leaves the folder to other settings.
                if parent is not None and trainer.is_global_zero and not steps_of(out / FOLDER):
                    release(out)
                raise
    if trainer.is_global_zero:
        print(f"run: {out.resolve()}")


main = partial(launch, "train", run_train, prepare=refuse_foreign_sizes)
"""Run ``train.py``, with the arguments of the command line unless others are given."""
