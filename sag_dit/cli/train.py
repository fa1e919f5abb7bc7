"""``train.py``: train a denoiser and leave a run folder that ``sample.py`` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sag_dit.cli.app import launch, literal, quiet_lightning


def run_folder(config: DictConfig) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights."""
    if config.out:
        return Path(config.out)
    values: Any = OmegaConf.to_container(config, resolve=False)
    # The seed is known here; ``out`` and the logger do not change weights.
    for key in ("out", "logger", "checkpoint"):
        values.pop(key, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return Path("outputs/train") / f"{config.name}-{digest[:8]}"


def run(config: DictConfig) -> None:
    """Train, and export the averaged weights."""
    quiet_lightning()
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from sag_dit.checkpoints import build, from_denoiser, write_safetensors
    from sag_dit.training.module import DiffusionModule

    out = run_folder(config)
    config.out = literal(str(out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    seed_everything(config.seed, verbose=False)
    data = instantiate(config.data)
    description: Any = {
        "model": OmegaConf.to_container(config.model, resolve=True),
        "process": OmegaConf.to_container(config.process, resolve=True),
        "kind": config.kind,
        "x_0_range": OmegaConf.to_object(config.x_0_range) if config.x_0_range else None,
        "class_names": list(data.class_names),
        "defaults": OmegaConf.to_container(config.defaults_for_sampling, resolve=True),
    }
    denoiser = build(description).train()
    if config.compile:
        denoiser.network.compile_blocks()
    module = DiffusionModule(
        from_denoiser(denoiser, config.name, defaults=description["defaults"]),
        optimizer=instantiate(config.optimizer),
        seed=config.seed,
    )
    last = ModelCheckpoint(
        dirpath=out / "checkpoints",
        every_n_train_steps=config.checkpoint.every_n_steps,
        save_last=True,
        save_top_k=0,
    )
    trainer: Trainer = instantiate(
        config.trainer,
        max_steps=config.max_steps,
        logger=instantiate(config.logger) if config.logger else False,
        callbacks=[instantiate(config.ema), last],
        val_check_interval=config.checkpoint.every_n_steps,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=literal(str(out)),
        _convert_="all",
    )
    resume = out / "checkpoints" / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=resume if resume.exists() else None)
    if trainer.global_rank == 0:
        # When training ends, Lightning leaves the averaged weights in the module.
        write_safetensors(out, denoiser, {"defaults": description["defaults"]})
        print(f"run: {out.resolve()}")


def main() -> None:
    """Run ``train.py``."""
    launch("train", run)
