"""The LightningModule that ``train.py`` fits: its objective, optimiser, rules and averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sag_dit.cli.composing import config_folder, make
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.keys import Train
from sag_dit.cli.values import as_callable, make_terms, why_not
from sag_dit.untrusted import read_yaml

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData
    from sag_dit.training.module import DiffusionModule
    from sag_dit.training.objective import Objective
    from sag_dit.training.optimizers import MakeOptimizer


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


def make_schedule(config: Train) -> Callable[[Optimizer], LRScheduler] | None:
    """Return what makes the schedule of an optimiser's learning rate, None where there is none.

    Raises:
        ValueError: it takes no such argument, or makes none.
    """
    from torch.optim.lr_scheduler import LRScheduler

    if not config.schedule:
        return None
    made: Callable[[Optimizer], LRScheduler] = make(
        {**config.schedule, "_partial_": True}, "schedule", LRScheduler
    )
    return made


def check_optimizer(config: Train) -> None:
    """Refuse an optimiser that cannot be made or used, and rules that are none, before all else.

    Raises:
        ValueError: the reason is told.
    """
    from sag_dit.training.optimizers import check_alone, stand_in
    from sag_dit.training.param_groups import rules_of

    further = (*config.ema.further.decays, *config.ema.further.sigma_rel)
    check_alone(stand_in(make_optimizer(config)), make_schedule(config), config.ema.decay, further)
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
    from sag_dit.training.averaging import Further
    from sag_dit.training.finetune import default_objective
    from sag_dit.training.module import DiffusionModule
    from sag_dit.training.objective import Objective

    wanted = config.objective
    denoiser = model.class_conditional.train()
    denoiser.network.checkpoint_blocks = config.checkpoint_blocks
    if config.compile:
        denoiser.network.compile_blocks()
    return DiffusionModule(
        model,
        objective=make(wanted, "objective", Objective) if wanted else default_objective(denoiser),
        optimizer=make_optimizer(config),
        param_groups=make_rules(config),
        schedule=make_schedule(config),
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        further=Further(config.ema.further.decays, config.ema.further.sigma_rel),
        max_skipped=config.max_skipped,
        seed=config.seed,
    )


def default_previews(config: Train, model: Model) -> Train:
    """Return the configuration without the guidance of previews that the model cannot have.

    That is of the guidance which is there by default; it is told. What is stated stays.
    """
    usual = read_yaml(config_folder() / "train.yaml")["preview"]["guidance"]
    kept = dict(config.preview.guidance)
    for name, settings in config.preview.guidance.items():
        where = f"preview.guidance.{name}"
        if settings is None or settings != usual.get(name) or config.states(where):
            continue
        reason = why_not(make_terms({name: settings}, "preview.guidance")[name], model)
        if reason:
            kept[name] = None
            if is_first_rank():
                print(f"previews are drawn without {where}, since {reason}")
    return replace(config, preview=replace(config.preview, guidance=kept))


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
