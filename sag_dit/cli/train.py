"""``train.py``: train a denoiser and leave a run folder that ``sample.py`` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sag_dit.cli.app import launch, literal, quiet_lightning
from sag_dit.cli.values import make_terms

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from sag_dit.checkpoints import Model
    from sag_dit.data.steps import StepData
    from sag_dit.training.module import DiffusionModule

NOT_WEIGHTS = ("out", "logger", "every_n_steps", "preview", "max_steps", "compile", "max_skipped")
"""Keys that do not change what the weights are after a given number of steps."""

FROM_CHECKPOINT = ("model", "process", "kind", "patch_size", "num_classes")
"""Keys of a fresh model; with ``ckpt`` they have to be null."""


def identity(config: DictConfig) -> dict[str, Any]:
    """Return what determines the weights, as plain values."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    for key in NOT_WEIGHTS:
        values.pop(key, None)
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def run_folder(config: DictConfig) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights."""
    if config.out:
        return Path(config.out)
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return Path("outputs/train") / f"{config.name}-{digest[:8]}"


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
        "model": settings,
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
    base = load(config.ckpt, vae=config.vae)
    if config.resolution is None:
        config.resolution = resolution_of(base)
    if "size" in config.data:
        config.data.size = config.resolution
    return base


def adapt_model(config: DictConfig, base: Model, data: StepData) -> tuple[Model, str]:
    """Make a loaded model fit the data, and return it with the report of what was done.

    Raises:
        ValueError: the data does not fit, or a pattern to freeze matches nothing.
    """
    from sag_dit.training.finetune import adapt, freeze, report

    adapted = adapt(base, config.name, data.class_names, config.resolution)
    frozen = freeze(adapted.model.denoiser.network, config.get("freeze") or ())
    return adapted.model, report(base, adapted, frozen)


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
        max_skipped=config.max_skipped,
        seed=config.seed,
    )


def make_trainer(config: DictConfig, out: Path) -> Trainer:
    """Build Lightning's Trainer with what watches, saves and stops a run."""
    from sag_dit.training.resume import StopOnSigterm, checkpoint_callbacks
    from sag_dit.training.watching import LossByLevel, Previews, Speed

    classes: Any = OmegaConf.to_object(config.preview.classes) if config.preview.classes else None
    every: Mapping[str, int] = config.every_n_steps
    callbacks: list[Callback] = [
        Speed(every["log"]),
        LossByLevel(every["log"]),
        Previews(
            out,
            every["preview"],
            classes,
            tuple(make_terms(config.preview.guidance).values()),
            config.preview.steps,
            config.seed,
        ),
        # Last, so that what they save is what the others have seen.
        *checkpoint_callbacks(out, every["checkpoint"]),
        StopOnSigterm(out),
    ]
    trainer: Trainer = instantiate(
        config.trainer,
        max_steps=config.max_steps,
        logger=instantiate(config.logger) if config.logger else False,
        callbacks=callbacks,
        log_every_n_steps=every["log"],
        val_check_interval=every["validation"],
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
    quiet_lightning()
    import torch

    from sag_dit.output.claim import claim
    from sag_dit.training.resume import export, newest_checkpoint

    if OmegaConf.is_missing(config, "name") or OmegaConf.is_missing(config, "max_steps"):
        raise ValueError(
            "name and max_steps are not set: choose what to train, such as experiment=digits or "
            "experiment=folder data.root=photos/"
        )
    if config.ckpt is None and config.model is None:
        raise ValueError(
            "ckpt is not set: expected what to fine-tune, such as ckpt=DiT-XL-2 or a run's folder"
        )
    base = load_base(config) if config.ckpt else None
    out = run_folder(config)
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
    settings: Any = OmegaConf.to_container(config, resolve=True)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, identity(config), settings, "a run")
    trainer = make_trainer(config, out)
    if told and trainer.is_global_zero:
        print(told)
    trainer.fit(module, datamodule=data, ckpt_path=newest_checkpoint(out), weights_only=True)
    export(trainer, module, out)
    if trainer.is_global_zero:
        print(f"run: {out.resolve()}")


def main() -> None:
    """Run ``train.py``."""
    launch("train", run)
