"""``train.py``: train a denoiser and leave a run folder that ``sample.py`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sag_dit.cli.app import KILL, launch, literal, quiet_lightning
from sag_dit.cli.run_identity import go_on_as_begun, identity, run_folder
from sag_dit.cli.values import check_logger, make_terms, with_models

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData
    from sag_dit.training.lora import LoRA
    from sag_dit.training.module import DiffusionModule

FROM_CHECKPOINT = ("model", "process", "kind", "patch_size", "num_classes")
"""Keys of a fresh model; with ``ckpt`` they have to be null."""


def make_model(config: DictConfig, data: StepData) -> Model:
    """Build a fresh model of the configured size for the data's classes.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    from sag_dit.checkpoints import build, from_denoiser
    from sag_dit.checkpoints.loading import find_codec
    from sag_dit.codec import VAECodec

    settings: Any = OmegaConf.to_container(config.model, resolve=True)
    vae = config.vae or data.vae
    codec = find_codec(vae)
    cell = codec.factor * config.patch_size
    if config.resolution % cell:
        raise ValueError(
            f"resolution={config.resolution}: expected a multiple of {cell}, the autoencoder's "
            f"factor {codec.factor} times patch_size={config.patch_size}"
        )
    latent = isinstance(codec, VAECodec)
    channels = codec.latent_channels if isinstance(codec, VAECodec) else data.channels
    if settings["input_size"] is None:
        settings["input_size"] = config.resolution // codec.factor
    if settings["in_channels"] is None:
        settings["in_channels"] = channels
    names = list(data.class_names)
    settings["num_classes"] = config.num_classes or len(names)
    description = {
        # Null is what only the other kind of network takes.
        "model": {name: value for name, value in settings.items() if value is not None},
        "process": OmegaConf.to_container(config.process, resolve=True),
        "kind": config.kind,
        "x_0_range": None if latent else [-1.0, 1.0],
        "class_names": names if len(names) == settings["num_classes"] else [],
    }
    sampling: Any = OmegaConf.to_container(config.sampling, resolve=True)
    return from_denoiser(build(description), config.name, codec=codec, defaults=sampling, vae=vae)


def load_base(config: DictConfig) -> Model:
    """Load the model to fine-tune; resolution, if null, and data.size follow it.

    Raises:
        ValueError: the checkpoint cannot be loaded, or a key is set that it determines.
    """
    from sag_dit.checkpoints import load
    from sag_dit.training.finetune import resolution_of

    stated = [key for key in FROM_CHECKPOINT if config.get(key) is not None]
    if stated:
        raise ValueError(
            f"ckpt={config.ckpt} determines {', '.join(stated)}: expected null; choose "
            f"experiment=finetune, which leaves these to the checkpoint and the data"
        )
    lora_settings(config)  # Before a checkpoint is downloaded.
    base = load(config.ckpt, vae=config.vae)
    if config.resolution is None:
        config.resolution = resolution_of(base)
    if "size" in config.data:
        config.data.size = config.resolution
    return base


def lora_settings(config: DictConfig) -> LoRA | None:
    """Return what adapters to train, None for the weights themselves.

    Raises:
        ValueError: a value is out of its range, or peft is not installed.
    """
    from sag_dit.training.lora import LoRA

    settings: Any = OmegaConf.to_container(config.get("lora") or OmegaConf.create(), resolve=True)
    return None if settings.get("rank") is None else LoRA(**settings)


def adapt_model(config: DictConfig, base: Model, data: StepData) -> tuple[Model, str]:
    """Make a loaded model fit the data, and return it with the report of what was done.

    Raises:
        ValueError: the data does not fit, or a pattern to freeze or to adapt matches nothing.
    """
    from sag_dit.training.finetune import TABLE, adapt, adaptation_report, freeze
    from sag_dit.training.lora import add_adapters

    adapted = adapt(base, config.name, data.class_names, config.resolution)
    network = adapted.model.denoiser.network
    frozen = freeze(network, config.get("freeze") or ())
    lora = lora_settings(config)
    if lora is None:
        return adapted.model, adaptation_report(base, adapted)
    layers = add_adapters(network, lora, frozen)
    # New classes have no rows but those that are learned now.
    network.get_parameter(TABLE).requires_grad_(TABLE in adapted.remade and TABLE not in frozen)
    return replace(adapted.model, lora=lora.description), adaptation_report(base, adapted, layers)


def make_module(config: DictConfig, model: Model) -> DiffusionModule:
    """Build what trains the model."""
    from sag_dit.training.finetune import default_objective
    from sag_dit.training.module import DiffusionModule

    wanted = config.get("objective")
    model.denoiser.train()
    model.denoiser.network.checkpoint_blocks = config.checkpoint_blocks
    if config.compile:
        model.denoiser.network.compile_blocks()
    return DiffusionModule(
        model,
        objective=instantiate(wanted) if wanted else default_objective(model.denoiser),
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule) if config.schedule else None,
        ema_decay=config.ema.decay,
        ema_warmup=bool(config.ema.get("warmup")),
        max_skipped=config.max_skipped,
        seed=config.seed,
    )


def make_loggers(config: DictConfig, out: Path, step: int) -> list[Logger]:
    """Build the logger, if any; at a step it goes on with what the run has logged before."""
    from sag_dit.training.loggers import going_on

    if not config.logger:
        return []
    more = going_on(config.logger._target_, out, step)
    return [instantiate(config.logger, **{k: v for k, v in more.items() if k not in config.logger})]


def make_trainer(config: DictConfig, out: Path) -> Trainer:
    """Build Lightning's Trainer with what watches, saves and stops a run; loggers come later.

    Raises:
        ValueError: a term of the previews is none.
    """
    from sag_dit.training.callbacks import LossByLevel, Previews, Progress, Speed
    from sag_dit.training.resume import AtomicCheckpointIO, LastCheckpoints, best_checkpoint

    classes: Any = OmegaConf.to_object(config.preview.classes) if config.preview.classes else None
    every: Mapping[str, Any] = config.every_n_steps
    callbacks: list[Callback] = [
        Speed(every["log"]),
        LossByLevel(every["log"]),
        Previews(
            out,
            every["preview"],
            classes,
            tuple(with_models(make_terms(config.preview.guidance)).values()),
            config.preview.steps,
            config.seed,
        ),
        *([Progress()] if config.trainer.enable_progress_bar else []),
        # Last, so that what they save is what the others have seen.
        best_checkpoint(out),
        LastCheckpoints(out, every["checkpoint"]),
    ]
    trainer: Trainer = instantiate(
        config.trainer,
        max_steps=config.max_steps,
        logger=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=every["log"],
        # Lightning counts batches here.
        val_check_interval=every["validation"] * config.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=literal(str(out)),
        _convert_="all",
    )
    return trainer


def run(config: DictConfig) -> None:
    """Train, and export the weights that are to be sampled with."""
    if OmegaConf.is_missing(config, "name") or OmegaConf.is_missing(config, "max_steps"):
        fresh = "experiment=digits or experiment=folder data.root=photos/"
        tuned = f"experiment=finetune ckpt={config.ckpt}"
        raise ValueError(
            f"name and max_steps are not set: choose what to train, such as "
            f"{fresh if config.ckpt is None else tuned}"
        )
    if config.ckpt is None and config.model is None:
        raise ValueError(
            "ckpt is not set: expected what to fine-tune, such as ckpt=DiT-XL-2 or a run's folder"
        )
    quiet_lightning()
    import torch

    from sag_dit.cli.tracking import trackers
    from sag_dit.output.claim import claim
    from sag_dit.training.resume import export_run, newest_checkpoint

    check_logger(config.logger)
    base = load_base(config) if config.ckpt else None
    out = run_folder(config)
    go_on_as_begun(config, out)
    config.out = literal(str(out))
    torch.set_float32_matmul_precision(config.matmul)
    torch.manual_seed(config.seed)
    data = instantiate(config.data)
    told = ""
    if base is None:
        model = make_model(config, data)
    else:
        model, told = adapt_model(config, base, data)
    data.check(model)
    module = make_module(config, model)
    trainer = make_trainer(config, out)
    trainer.callbacks[:0] = trackers(config, model, out, trainer.strategy.root_device)  # type: ignore[attr-defined]
    data.rank_batch_size(trainer.world_size)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, identity(config), settings, "a run")
    checkpoint, step = newest_checkpoint(out, module)
    if told and trainer.is_global_zero:
        print(told)
    trainer.loggers = make_loggers(config, out, step)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        export_run(trainer, module, out)
    except BaseException:
        # Ranks that Lightning has started would wait for this one, holding their devices.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(KILL)
        raise
    if trainer.is_global_zero:
        print(f"run: {out.resolve()}")


def main() -> None:
    """Run ``train.py``."""
    launch("train", run)
