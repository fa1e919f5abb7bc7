"""Lightning's Trainer of ``train.py``: its own callbacks, loggers and plugins, and the user's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.composing import check_target, make
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import substituted, to_dict
from sag_dit.cli.values import make_terms
from sag_dit.messages import counted

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData


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
    check_callbacks(own, epochs=epochs, logs=bool(loggers_of(config)))
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
        **own_profiler(config),
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


def own_callbacks(config: Train) -> list[Callback]:
    """Build the user's callbacks.

    Raises:
        ValueError: one is no callback, or two keep their state under one name.
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from sag_dit.training.callbacks import strange_hooks

    made: list[Callback] = []
    for place, settings in enumerate(as_list(config.trainer.get("callbacks"))):
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
        for told in strange_hooks(each) if is_first_rank() else ():
            print(f"warning: {where}: {told}", file=sys.stderr)
    return made


def own_profiler(config: Train) -> dict[str, Any]:
    """Build the user's profiler where it is a class; the Trainer knows its own by name.

    Raises:
        ValueError: it is no profiler.
    """
    from lightning.pytorch.profilers import Profiler

    stated = config.trainer.get("profiler")
    if not isinstance(stated, Mapping):
        return {}
    return {"profiler": make(stated, "trainer.profiler", Profiler)}


def own_plugins(config: Train) -> list[Any]:
    """Build the user's plugins.

    Raises:
        ValueError: one would take the place of what a run needs.
    """
    from lightning.pytorch.plugins import CheckpointIO, Precision

    made = []
    for place, settings in enumerate(as_list(config.trainer.get("plugins"))):
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


def as_list(value: Any) -> list[Any]:
    """Return what may stand alone, or be left out, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, Mapping) else list(value)


def loggers_of(config: Train) -> dict[str, Mapping[str, Any]]:
    """Return the settings of all loggers by the keys at which they stand."""
    further = as_list(config.trainer.get("logger"))
    named = {f"trainer.logger[{place}]": each for place, each in enumerate(further)}
    return ({"logger": config.logger} if config.logger else {}) | named


def names_of_loggers(config: Train, out: Path) -> dict[str, str]:
    """Return names of the loggers by the keys at which they stand: what was stated of each.

    So each goes on with its own log, wherever it stands at the next start. Of several of which the
    same was stated, the later ones have a number.
    """
    names: dict[str, str] = {}
    for where, settings in loggers_of(config).items():
        # The same folder may be written in several ways.
        stated = substituted(settings, str(out), "")
        name = json.dumps(stated, sort_keys=True, default=str)
        twins = sum(each.startswith(name) for each in names.values())
        names[where] = f"{name} {twins + 1}" if twins else name
    return names


def make_loggers(config: Train, out: Path, step: int) -> dict[str, Logger]:
    """Build the loggers, by their keys; at a step they go on with the logs of the run so far."""
    from lightning.pytorch.loggers import Logger

    from sag_dit.training.loggers import going_on

    made, names = {}, names_of_loggers(config, out)
    for where, settings in loggers_of(config).items():
        target = str(settings.get("_target_"))
        check_target(settings, where)
        goes_on = going_on(target, names[where], out, step)
        made[where] = make({**goes_on, **settings}, where, Logger)
    return made


def begin_loggers(config: Train, out: Path, step: int, made: Mapping[str, Logger]) -> None:
    """Log the settings, write down which logs there are, and tell which are not gone on with."""
    from sag_dit.training.loggers import going_on, note_versions

    names = names_of_loggers(config, out)
    for where, settings in loggers_of(config).items():
        target = str(settings.get("_target_"))
        # MLflow refuses a setting that has changed since; the run's config.yaml has it.
        if "run_id" not in going_on(target, names[where], out, step):
            made[where].log_hyperparams(to_dict(config))
    if is_first_rank():
        others = note_versions(out, {names[where]: each for where, each in made.items()})
        for where, each in made.items() if step else ():
            if names[where] in others:
                print(f"{where}: {type(each).__name__} begins another log at each start")


def check_validated(config: Train, data: StepData, trainer: Trainer) -> bool:
    """Return whether a run validates; refuse what waits in vain for that, or for what it logs.

    Raises:
        ValueError: a callback that monitors what nothing logs, or checkpoints by a loss on held-out
            images, where there is none, or a share of the batches that is none.
    """
    from sag_dit.training.callbacks import check_monitors

    why, every = None, config.every_n_steps.validation
    limit = config.trainer.get("limit_val_batches")
    if limit == 0:
        why = "trainer.limit_val_batches is 0: expected another"
    elif not data.validates:
        why = "no image is held out: expected held-out images, such as data.held_out=0.1"
    validates = why is None
    if why and config.keep.best > 1:
        raise ValueError(
            f"keep.best={config.keep.best}: {why}; without val/loss there is none to choose them "
            f"by: expected keep.best=0"
        )
    if validates and every > config.max_steps and not config.trainer.get("fast_dev_run"):
        why = f"every_n_steps.validation={every}: expected at most max_steps={config.max_steps}"
    check_monitors(trainer.callbacks, why)  # type: ignore[attr-defined]
    # Lightning takes a whole number for a number of batches, and 1.0 for all.
    if validates and isinstance(limit, float) and limit != 1:
        check_share(limit, data.val_dataloader())
    return validates


def check_share(share: float, loaders: Any) -> None:
    """Refuse a share of the validation batches that is not even one, or that cannot be counted.

    Raises:
        ValueError: the share, and the least that is a batch.
    """
    told = f"trainer.limit_val_batches={share}"
    for each in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        try:
            batches = len(each)
        except TypeError as error:  # As of an IterableDataset.
            raise ValueError(
                f"{told}: a share of batches that nobody can count; expected a whole number"
            ) from error
        if int(batches * share) == 0:
            least = math.ceil(10_000 / batches) / 10_000
            raise ValueError(
                f"{told}: the held-out images are {counted(batches, 'batch', 'batches')}, of which "
                f"that is less than one; expected {least:g} or more, or a whole number of batches"
            )


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
