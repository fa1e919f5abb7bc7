"""Arguments of Lightning's Trainer that a command cannot follow: each is refused, with the reason.

All others are handed to the Trainer, so that nothing that a user states is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from sag_dit.bounds import shown

STEPS = "training counts steps, and max_steps says how many"
NO_SUCH_LOOP = "train.py trains and validates, and has no such loop; leave it out"
OF_TRAINING: Mapping[str, str] = {
    "max_epochs": STEPS,
    "min_epochs": STEPS,
    "max_steps": "set max_steps instead",
    "default_root_dir": "set out instead",
    "log_every_n_steps": "set every_n_steps.log instead",
    "val_check_interval": "set every_n_steps.validation instead",
    "check_val_every_n_epoch": "set every_n_steps.validation instead",
    "limit_test_batches": NO_SUCH_LOOP,
    "limit_predict_batches": NO_SUCH_LOOP,
    "reload_dataloaders_every_n_epochs": "batches follow from seed and step; leave it out",
    "use_distributed_sampler": "each rank reads its own part of a batch anyway; leave it out",
    "enable_autolog_hparams": "settings are logged by whatever logs; logger=null logs nothing",
    "enable_checkpointing": "a run goes on from its last two checkpoints; "
    "every_n_steps.checkpoint says how often they are saved",
    "barebones": "a run logs, validates and saves checkpoints; leave it out",
    "model_registry": "checkpoints stay in the run's folder; leave it out",
}
"""Why a training run does not take an argument, and what to do instead."""

DRAWS = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "callbacks"),
    *("profiler", "deterministic", "benchmark", "barebones"),
)
"""What the Trainer of a command that draws takes; the rest is for training."""

OF_DRAWING: Mapping[str, str] = {
    "limit_predict_batches": "num_images says how many images are drawn",
    "fast_dev_run": "num_images=1 steps=2 draws little",
    "logger": "set logger instead",
    "default_root_dir": "set out instead",
}
"""What to do instead of some of the rest."""


def check_training(stated: Mapping[str, Any], max_steps: int) -> None:
    """Refuse arguments of the Trainer that a training run of so many steps cannot follow.

    Raises:
        ValueError: such an argument is set; the message says what to do instead.

    Example:
        >>> check_training({"devices": 1, "profiler": "simple"}, max_steps=100)
    """
    for name in OF_TRAINING.keys() & stated.keys():
        if stated[name] is not None:
            raise ValueError(f"trainer.{name}={shown(stated[name])}: {OF_TRAINING[name]}")
    least = stated.get("min_steps")
    if least is not None and not 0 <= least <= max_steps:
        raise ValueError(f"trainer.min_steps={least}: expected 0 to max_steps={max_steps}")
    if stated.get("gradient_clip_algorithm") and not stated.get("gradient_clip_val"):
        raise ValueError(
            f"trainer.gradient_clip_algorithm={stated['gradient_clip_algorithm']}: nothing is "
            f"clipped without trainer.gradient_clip_val: set it too, such as 1.0"
        )
    each = stated.get("accumulate_grad_batches") or 1
    for name in ("limit_train_batches", "overfit_batches"):
        number = stated.get(name)
        if isinstance(number, int) and number % each:
            # The last step would be of fewer batches.
            raise ValueError(
                f"trainer.{name}={number}: a step has trainer.accumulate_grad_batches={each} "
                f"batches; expected a multiple of it, such as {-(-number // each) * each}"
            )
    strategy = str(stated.get("strategy"))
    others = strategy.startswith("ddp_") and not strategy.startswith("ddp_find_unused")
    if others or "spawn" in strategy:
        raise ValueError(
            f"trainer.strategy={strategy}: each rank is a command of its own here: expected ddp"
        )


def check_drawing(stated: Mapping[str, Any]) -> None:
    """Refuse arguments of the Trainer that only mean something in training.

    Raises:
        ValueError: such an argument is set.

    Example:
        >>> check_drawing({"devices": 1, "profiler": "simple"})
    """
    others = [name for name in stated if name not in DRAWS and stated[name] is not None]
    if all(name.startswith("_") for name in others):
        return  # As it mostly is; Lightning takes seconds to import.
    from lightning.pytorch import Trainer

    for name in others:
        # A Trainer of the user's own may take more than Lightning's.
        if name in signature(Trainer).parameters:
            told = OF_DRAWING.get(name, "that is for training; leave it out")
            raise ValueError(f"trainer.{name}={shown(stated[name])}: {told}")


ENCODES = ("_target_", "accelerator", "strategy", "devices", "num_nodes")
"""What Lightning's Fabric takes of a command that encodes."""


def check_encoding(stated: Mapping[str, Any]) -> None:
    """Refuse arguments of Lightning's Fabric that change nothing of an encoding.

    Raises:
        ValueError: such an argument is set.

    Example:
        >>> check_encoding({"devices": 2})
    """
    for name in stated.keys() - {*ENCODES}:
        if stated[name] is not None:
            raise ValueError(
                f"trainer.{name}={shown(stated[name])}: encoding makes no use of it; leave it out"
            )
