"""What a run takes over of another one: ``resume_from``, and ``finetune.optimizer``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sag_dit.cli.keys import Train

if TYPE_CHECKING:
    from sag_dit.training.going_on import Adopts, Parent


def check_resuming(config: Train) -> None:
    """Refuse what cannot be taken over from another run, before anything is loaded.

    Raises:
        ValueError: a key that ``resume_from`` does not go with.
    """
    if config.resume_from is None:
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
