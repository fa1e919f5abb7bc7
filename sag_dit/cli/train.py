"""``train.py``: train a denoiser and leave a run folder that ``sample.py`` reads."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sag_dit.cli.app import alone_in, launch, quiet_lightning
from sag_dit.cli.composing import make_around, placed
from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import keys_of, to_dict
from sag_dit.cli.resume_from import adopting, check_resuming, parent_of
from sag_dit.cli.run_identity import (
    begin_from,
    changeable,
    changes,
    check_schedule,
    claim_data,
    go_on_as_begun,
    identity,
    note_changes,
    run_folder,
    told_differences,
)
from sag_dit.cli.schema import refuse_idle, told_too_late
from sag_dit.cli.train_model import adapt_model, load_base, make_model, refuse_foreign_sizes
from sag_dit.cli.train_module import (
    check_objective,
    check_optimizer,
    default_previews,
    make_module,
    make_optimizer,
)
from sag_dit.cli.trainer import (
    begin_loggers,
    check_previews,
    check_validated,
    loggers_of,
    make_loggers,
    make_trainer,
)
from sag_dit.cli.trainer_flags import check_training
from sag_dit.cli.values import check_logger
from sag_dit.messages import counted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData
    from sag_dit.training.going_on import Adopts
    from sag_dit.training.module import DiffusionModule


class Parts(NamedTuple):
    """What is put together for a run before its folder is claimed.

    Attributes:
        data: its batches.
        module: what is trained.
        trainer: with its callbacks; loggers come later.
        adaptation: how a loaded model was made to fit the data, in words.
        anew: names of its parameters that were made anew.
        validates: whether there is a loss on held-out images.

    Example::

        parts = put_together(config, None, Path("outputs/train/digits-1f3a"))
        parts.trainer.fit(parts.module, datamodule=parts.data)
    """

    data: StepData
    module: DiffusionModule
    trainer: Trainer
    adaptation: str
    anew: Collection[str]
    validates: bool


def check_stated(config: Train) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Raises:
        ValueError: the key, and the remedy.
    """
    refuse_idle(config)
    check_resuming(config)
    if config.ckpt is None and config.model is None:
        raise ValueError(
            "ckpt is not set: expected what to fine-tune, such as ckpt=DiT-XL-2 or a run's folder"
        )
    quiet_lightning()
    check_training(config.trainer, config.max_steps)
    for where, each in loggers_of(config).items():
        check_logger(each, where)
    check_optimizer(config)


def put_together(config: Train, base: Model | None, out: Path) -> Parts:
    """Make data, model, module and Trainer, and check that they fit each other.

    Raises:
        ValueError: they do not; nothing has been written.
    """
    import torch

    from sag_dit.cli.tracking import trackers
    from sag_dit.training.optimizers import check_steps

    torch.set_float32_matmul_precision(config.matmul)
    torch.manual_seed(config.seed)
    # The data, and a model that fits it.
    data: StepData = make_around(config.data, "data", keys_of(Train)["data"][1].around)
    told = ""
    anew: Collection[str] = ()
    if base is None:
        model = make_model(config, data)
    else:
        model, told, anew = adapt_model(config, base, data)
    data.check(model)
    # What trains it.
    module = make_module(config, model)
    check_objective(module.objective, data, config)
    config = default_previews(config, model)
    check_previews(config, model)
    trainer = make_trainer(config, out)
    device = trainer.strategy.root_device
    check_steps(make_optimizer(config), module.groups(), device)
    tracked = trackers(config.track, model, out, device, config.every_n_steps.preview)
    trainer.callbacks[:0] = tracked  # type: ignore[attr-defined]
    validates = check_validated(config, data, trainer)
    refuse_idle(config, validates=validates)
    data.rank_batch_size(trainer.world_size)
    return Parts(data, module, trainer, told, anew, validates)


def taken_over(config: Train, parts: Parts, out: Path) -> Adopts | None:
    """Return what takes the state of another run over, None where the configuration names none.

    Raises:
        ValueError: there is no such run, or its state does not fit.
    """
    parent = parent_of(config)
    if parent is None:
        return None
    adopts = adopting(config, parent, out, parts.anew)
    images = parts.data.batch_size * parts.trainer.accumulate_grad_batches
    adopts.prepare(parts.trainer, parts.module, images)
    return adopts


def train_on(config: Train, parts: Parts, out: Path, checkpoint: Path | None, step: int) -> None:
    """Train from a checkpoint's step on, on all ranks, and export the weights."""
    from sag_dit.cli.stopping import ending_together, naming_lost_nodes, telling_what_is_kept
    from sag_dit.training.callbacks import telling_what_is_not_logged
    from sag_dit.training.console import Lines
    from sag_dit.training.resume import export_run

    trainer = parts.trainer
    loggers = make_loggers(config, out, step)
    trainer.loggers = [*loggers.values()]
    if config.trainer.get("enable_progress_bar", True) and trainer.progress_bar_callback is None:
        trainer.loggers = [*trainer.loggers, Lines(trainer)]
    with ending_together(trainer), telling_what_is_kept(trainer), naming_lost_nodes(trainer):
        begin_loggers(config, out, step, loggers)
        with telling_what_is_not_logged(trainer):
            trainer.fit(
                parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True
            )
        export_run(trainer, parts.module, out)
    if trainer.is_global_zero and trainer.global_step < config.max_steps:
        print(early_end_report(out, trainer.global_step, config.max_steps))


def early_end_report(out: Path, step: int, steps: int) -> str:
    """Return why a run has ended before its last step, and whether it goes on."""
    from sag_dit.training.resume import ended_by, step_checkpoint

    checkpoint, at = step_checkpoint(out, step), f"step {step} of {steps}"
    why = ended_by(checkpoint)
    if why is not None:
        return f"finished at {at}: {why}"
    told = "saved at" if checkpoint.exists() else "ended unsaved at"
    return f"{told} {at}, where the trainer was told to stop; repeat the command to go on"


def try_out(parts: Parts) -> None:
    """Train the few steps of ``trainer.fast_dev_run``, which leave nothing."""
    parts.trainer.fit(parts.module, datamodule=parts.data)
    if parts.trainer.is_global_zero:
        ran = counted(parts.trainer.global_step, "step")
        print(f"fast_dev_run: {ran} ran and validated; nothing is kept")


def claim_run(config: Train, out: Path, *, begun: bool) -> dict[str, list[Any]]:
    """Claim a run's folder; return the settings that have changed since it was begun.

    Raises:
        ValueError: it holds a run of other settings, or a schedule that depends on ``max_steps``.
    """
    from sag_dit.output.claim import claim

    settings = to_dict(config)
    out.mkdir(parents=True, exist_ok=True)
    check_schedule(settings, out)
    changed = changes(settings, out)
    remedy = f", or begin another run from it: resume_from={out}"
    claim(out, identity(settings), settings, "a run", remedy * begun, changeable())
    return changed


def finished_report(out: Path, step: int, ended: str | None) -> str:
    """Return that a run is finished, by what if it was ended early, and what can be done then."""
    why, remedy = "", "a larger max_steps goes on"
    if ended:
        why, remedy = f" ({ended})", f"begin another run from it: resume_from={out}"
    return f"finished at step {step}{why}: nothing is left to train; {remedy}"


def beginning_report(
    config: Train, parts: Parts, out: Path, step: int, adopts: Adopts | None
) -> str:
    """Return in lines what is trained, on what, for how long, and what is taken over."""
    from sag_dit.training.start import start_report

    data, module = parts.data, parts.module
    images, epoch = data.batch_size, len(data.training_images)
    lines = [
        parts.adaptation,
        data.report(),
        start_report(module, parts.trainer, images, step, epoch),
        module.groups_report(),
        disk_report(config, module, parts.validates),
        *told_too_late(config, config.max_steps),
    ]
    if adopts is not None:
        if config.resume_from is not None:
            lines.append(told_differences(out, adopts.parent.folder, adopts.parent.step))
        lines += [f"  {each}" for each in adopts.told]
    return "\n".join(filter(None, lines))


def disk_report(config: Train, module: DiffusionModule, validates: bool) -> str:
    """Return in a line how much of the disk a run takes at most."""
    sizes = {id(each): each.numel() * each.element_size() for each in module.state_dict().values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    # What Adam holds: two numbers for each that is trained.
    checkpoint = sum(sizes.values()) + 2 * sum(p.numel() * p.element_size() for p in trained)
    keep, widths = config.keep, config.ema.further.sigma_rel
    network = sum(p.numel() * p.element_size() for p in module.denoiser.parameters())
    number = min(keep.snapshots, config.max_steps // config.every_n_steps.snapshot)
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
    check_stated(config)
    from sag_dit.training.resume import (
        FOLDER,
        ended_by,
        exported_step,
        newest_checkpoint,
        steps_of,
    )

    # The folder follows from what determines the weights, a checkpoint's resolution included.
    base = None
    if config.ckpt:
        base, config = load_base(config)
    out = run_folder(to_dict(config))
    config = placed(go_on_as_begun(config, out), out)
    parts = put_together(config, base, out)
    trainer = parts.trainer
    # What a new run takes over of another one has to fit before there is a folder.
    begun = bool(steps_of(out / FOLDER))
    adopts = None if begun else taken_over(config, parts, out)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        try_out(parts)
        return
    # The folder is claimed, and a run that was begun there goes on.
    changed = claim_run(config, out, begun=begun)
    with alone_in(out):
        if trainer.is_global_zero:
            claim_data(out, parts.data.fingerprint(), on_purpose=config.changed_data)
        checkpoint, step = newest_checkpoint(out, parts.module)
        if trainer.is_global_zero:
            note_changes(out, changed, step)
        if checkpoint is None and begun:  # None of those that there are can be read.
            adopts = taken_over(config, parts, out)
        if checkpoint is None and adopts is not None:
            trainer.callbacks.insert(0, adopts)  # type: ignore[attr-defined]
            checkpoint, step = adopts.file, adopts.step
        # All that is left to do is told, and done.
        ended = None if checkpoint is None else ended_by(checkpoint)
        finished = (ended or step >= config.max_steps) and exported_step(out) == step
        if trainer.is_global_zero and finished:
            print(finished_report(out, step, ended))
        elif trainer.is_global_zero:
            if adopts is not None and config.resume_from is not None:
                begin_from(out, adopts.parent.folder, adopts.parent.step)
            print(beginning_report(config, parts, out, step, adopts))
        if not finished:
            if ended:  # Before its weights were exported.
                trainer.fit_loop.epoch_loop.max_steps = step
            train_on(config, parts, out, checkpoint, step)
    if trainer.is_global_zero:
        print(f"run: {out.resolve()}")


main = partial(launch, "train", run_train, prepare=refuse_foreign_sizes)
"""Run ``train.py``, with the arguments of the command line unless others are given."""
