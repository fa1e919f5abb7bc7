"""Going on from another run under other settings: its weights, averages, optimiser and step.

What is taken over is written as the first checkpoint of the new run. From then on it is a run like
any other, which needs the other one no more and goes on after a stop from its own checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, Timer
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from sag_dit.bounds import shown
from sag_dit.checkpoints import averages, files, trainers
from sag_dit.files import atomic
from sag_dit.identity import plain as plain_values
from sag_dit.messages import counted
from sag_dit.raised import is_ours
from sag_dit.training.module import IMAGES, DiffusionModule
from sag_dit.training.optimizers import Kept, kept_after_a_step, options_of
from sag_dit.training.resume import (
    ENDED,
    FOLDER,
    BestCheckpoints,
    begin_next_epoch,
    step_checkpoint,
    steps_of,
)
from sag_dit.untrusted import TARGET

SHOWN = 3
AVERAGED = "averaged"
BOOKKEEPING = {"params", "param_names", "initial_lr"}
"""What stands in an optimiser's groups beside its options and what it counts there."""
OF_SCHEDULES = {"max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""What torch's schedules put there besides ``initial_lr``; it is the new schedule's."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint of another run.

    Attributes:
        checkpoint: the file.
        folder: of the run.
        step: of the checkpoint.
        state: what is in it, mapped from the disk.

    Example::

        parent = find_parent("outputs/train/RUN", "resume_from=outputs/train/RUN")
        print(parent.step)
    """

    checkpoint: Path
    folder: Path
    step: int
    state: Mapping[str, Any]


def find_parent(path: Path, where: str) -> Parent:
    """Return a run's newest checkpoint that can be read, or the one that ``path`` is.

    ``where`` is the key that names it, for the message.

    Raises:
        ValueError: there is none, or it is no checkpoint of a run.
    """
    # A sharded one is told what to do with, as when it is drawn from.
    found = [path] if path.is_file() else steps_of(path / FOLDER)
    trainers.refuse_pieces(path)
    unread: Exception | None = None
    for file in found:
        trainers.refuse_pieces(file)
        try:
            state = files.read_torch(file)
        except ValueError as error:
            unread = error
            continue
        # What it has to be, to be gone on from.
        if not isinstance(state, Mapping) or not isinstance(state.get("global_step"), int):
            raise ValueError(f"{where}: {file} is no checkpoint of a run; expected one of train.py")
        return Parent(file, file.parent.parent, int(state["global_step"]), state)
    told = f"{unread}" if unread else f"{path} holds no checkpoints/step-*.ckpt"
    raise ValueError(f"{where}: {told}; expected the folder of a run, or one of its checkpoints")


class Adopts(Callback):
    """Writes a parent's checkpoint as the first one of a new run; rank 0 does, the others wait.

    ``step`` is where the new run begins. With ``weights`` the parent's weights and averages are
    taken, else they are the module's own. With ``optimizer`` its state is taken, but for parameters
    of the network that are in ``anew``; ``past`` are the steps that the schedule of the learning
    rate takes to be over.

    Raises:
        ValueError: the parent is of another network, or its optimiser's state does not fit.

    Example::

        adopts = Adopts(parent, out, step=parent.step, past=parent.step)
        trainer = Trainer(callbacks=[adopts])
        adopts.prepare(trainer, module, images_in_a_step=256)
        print(adopts.told)
        trainer.fit(module, data, ckpt_path=adopts.file)
    """

    def __init__(
        self,
        parent: Parent,
        out: Path,
        *,
        step: int,
        past: int,
        weights: bool = True,
        optimizer: bool = True,
        anew: Collection[str] = (),
        where: str = "resume_from",
    ) -> None:
        self._anew = {f"denoiser.network.{name}" for name in anew}
        self.parent, self._out, self.step, self._past = parent, out, step, past
        self._weights, self._optimizer, self._where = weights, optimizer, where
        self._adopted: dict[str, Any] | None = None
        self._counted, self.told = 1.0, list[str]()
        self.file = step_checkpoint(out, step)

    def prepare(self, trainer: Trainer, module: DiffusionModule, images_in_a_step: int) -> None:
        """Choose what is taken over, before anything is written; ``told`` says it in words.

        Raises:
            ValueError: the parent is of another network, or its optimiser's state does not fit.
        """
        # Weights and averages.
        lines, state, each = list[str](), dict(module.state_dict()), 1.0
        if self._weights:
            lines, state = _adopted_weights(self.parent, module, self._where)
            there = self.parent.state.get(IMAGES)
            each = there / images_in_a_step if there else 1.0
            lines += _counted_in(each, state)
        # The optimiser's state, under the options that it has now.
        configured = module.configure_optimizers()
        several = isinstance(configured, Mapping)
        optimizer: Optimizer = configured["optimizer"] if several else configured
        schedule = configured["lr_scheduler"]["scheduler"] if several else None
        if schedule is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                for _ in range(self._past):
                    schedule.step()
        held, told_of = _adopted_optimizer(
            self.parent, module, optimizer, self._where, take=self._optimizer, anew=self._anew
        )
        lines.append(told_of)
        # What callbacks keep.
        states: dict[str, Any] = {}
        if self._weights:
            states, told = _adopted_callbacks(self.parent, trainer.callbacks)  # type: ignore[attr-defined]
            lines += told
        self._counted = each
        self._adopted = {
            "global_step": self.step,
            "pytorch-lightning_version": self.parent.state["pytorch-lightning_version"],
            "state_dict": dict(state),
            "callbacks": states,
            "optimizer_states": [held],
            "lr_schedulers": [] if schedule is None else [schedule.state_dict()],
        }
        self.told = lines

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it before Lightning reads it."""
        adopted, self._adopted = self._adopted, None
        if adopted is not None and trainer.is_global_zero:
            # Snapshots of its averages, then what Lightning would save.
            if self._weights:
                kept = averages.averages_in(adopted["state_dict"])
                _link_snapshots(self.parent, self._out, kept, self._counted)
            loops = _loops_at(trainer, self.step, bool(adopted["lr_schedulers"]))
            epoch = loops["fit_loop"]["epoch_progress"]["current"]["completed"]
            checkpoint = {"epoch": epoch, "loops": loops, **adopted}
            pl_module.on_save_checkpoint(checkpoint)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.file) as temporary, temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
        trainer.strategy.barrier("adopted")


def _adopted_weights(
    parent: Parent, module: DiffusionModule, where: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the state of a module with all that a parent has of it, and what is not the parent's.

    Raises:
        ValueError: the parent's network is another one.
    """
    plain = files.without_wrappers
    there = {plain(name): value for name, value in parent.state["state_dict"].items()}
    own = dict(module.state_dict())

    def fits(name: str) -> bool:
        found = there.get(plain(name))
        return found is not None and found.shape == own[name].shape

    # The network itself has to fit.
    network = [name for name in own if name.startswith("denoiser.")]
    odd = [name for name in network if not fits(name)]
    odd += [n for n in there if n.startswith("denoiser.") and n not in map(plain, network)]
    if odd:
        found = (each.get(odd[0]) for each in (there, own))
        sizes = ["missing" if each is None else tuple(each.shape) for each in found]
        raise ValueError(
            f"{where}: {parent.checkpoint} is of another network: {len(odd)} tensors differ, the "
            f"first is {odd[0]}, there {sizes[0]} and here {sizes[1]}; repeat the run's settings "
            f"of the network, or fit it to others by experiment=finetune ckpt={parent.folder}"
        )
    _refuse_other_settings(parent, module.model.description["model"], where)
    state = {name: there[plain(name)] for name in network}
    # Each average as a whole, or from the weights as they are; the first update copies them.
    lines, begun = [], []
    starts = [AVERAGED] if module.averaged is not None else []
    starts += [f"{averages.FURTHER}{name}" for name in module.further]
    for start in starts:
        names = [name for name in own if name.startswith(f"{start}.")]
        if all(map(fits, names)):
            state |= {name: there[plain(name)] for name in names}
            continue
        begun.append(start)
        inside = f"{start}{averages.MODULE}"
        for name in names:
            raw = name.replace(inside, "denoiser.")
            state[name] = state[raw] if name.startswith(inside) else torch.zeros_like(own[name])
    taken = [each for each in starts if each not in begun]
    for which, what in (
        (taken, "averages taken over"),
        (begun, "averages that start here, from the weights taken over"),
    ):
        lines += [f"{what}: {', '.join(map(_average, which))}"] if which else []
    # Whatever else is trained or averaged.
    rest = [name for name in own if name not in state]
    fresh = [name for name in rest if not fits(name)]
    state |= {name: there[plain(name)] if fits(name) else own[name] for name in rest}
    left = [n for n in there if n not in map(plain, state)]
    told = (
        (fresh, "not in that run, so they start with fresh values"),
        (left, "in that run alone, so they are left out"),
    )
    for names, what in told:
        groups = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
        lines += [f"{what}: {_some([*groups])}"] if names else []
    return lines, state


def _refuse_other_settings(parent: Parent, here: Mapping[str, Any], where: str) -> None:
    """Refuse a network of the same shapes that computes other things of them, as by its heads.

    How often it drops something while it is trained may differ. What the settings of a network of
    one's own mean is not known.

    Raises:
        ValueError: a setting differs; it is named.
    """
    there = (parent.state.get("hyper_parameters") or {}).get("model") or {}
    if TARGET in there or TARGET in here:
        return
    for name in sorted(there.keys() & here.keys()):
        if plain_values(there[name]) != plain_values(here[name]) and "drop" not in name:
            raise ValueError(
                f"{where}: {parent.checkpoint} is of another network: model.{name} is "
                f"{shown(there[name])} there and {shown(here[name])} here, which changes what its "
                f"weights mean; repeat model.{name}={shown(there[name])}"
            )


def _average(start: str) -> str:
    return "ema" if start == AVERAGED else start.rpartition(".")[2].replace("_", ".")


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"


def _adopted_callbacks(
    parent: Parent, callbacks: Sequence[Callback]
) -> tuple[dict[str, Any], list[str]]:
    """Return the states of callbacks that a parent has, and in words which, of the user's own.

    What keeps checkpoints knows the files of its own run, and a timer counts from each start.
    """
    there = parent.state.get("callbacks") or {}
    states, taken, fresh = dict[str, Any](), list[str](), list[str]()
    for each in callbacks:
        if not _has_state(each):
            continue
        key, name = each.state_key, type(each).__name__
        begins = isinstance(each, (Checkpoint, Timer)) or key not in there
        # One that has ended the parent would end this run as well.
        begins = begins or (isinstance(each, EarlyStopping) and ENDED in parent.state)
        if not begins:
            states[key] = there[key]
            if isinstance(each, EarlyStopping):
                # A setting, which its state holds too.
                states[key] = {**there[key], "patience": each.patience}
        if not is_ours(type(each)):
            (fresh if begins else taken).append(name)
    here = {each.state_key for each in callbacks}
    ours = {
        BestCheckpoints.__name__,
        *(type(each).__name__ for each in callbacks if is_ours(type(each))),
    }
    gone = [re.split(r"\W", key)[0] for key, state in there.items() if state and key not in here]
    left = [name for name in gone if name not in ours]
    told = (
        ("callbacks taken over", taken),
        ("callbacks that start with a fresh state", fresh),
        ("callbacks of that run alone, so they are left out", left),
    )
    return states, [f"{what}: {', '.join(names)}" for what, names in told if names]


def _has_state(callback: Callback) -> bool:
    return type(callback).state_dict is not Callback.state_dict


def _adopted_optimizer(
    parent: Parent,
    module: DiffusionModule,
    optimizer: Optimizer,
    where: str,
    *,
    take: bool,
    anew: Collection[str],
) -> tuple[dict[str, Any], str]:
    """Return an optimiser's state with the parent's moments, by the parameters' names, and a line.

    The options, such as the rate, are the optimiser's own. A parameter of which it keeps other
    things than the parent's did, as Muon and AdamW do, begins anew.

    Raises:
        ValueError: the parent's is of another optimiser, or of none of the parameters.
    """
    names = {id(each): name for name, each in module.named_parameters()}
    shapes = {name: each.shape for name, each in module.named_parameters()}
    groups = [
        {**group, "params": [names[id(each)] for each in group["params"]]}
        for group in optimizer.param_groups
    ]
    trained = [name for group in groups for name in group["params"]]
    if not take:
        none: dict[str, Any] = {name: {} for name in trained}
        return {"state": none, "param_groups": groups}, "optimiser: starts with a fresh state"
    there, after = _optimizer_there(parent), _kept_of(module)
    if there is None or not _same_kind(there["param_groups"], groups, after):
        raise ValueError(
            f"{where}: the optimiser's state in {parent.checkpoint} is of another optimiser than "
            f"{type(optimizer).__name__}; expected the same, or that it begins anew: "
            f"{_anew(where)}"
        )
    # Which parameter each state is of: recorded, or in their order.
    indices = [each for group in there["param_groups"] for each in group["params"]]
    recorded = parent.state.get("optimizer_parameters")
    known = recorded if isinstance(recorded, list) else trained
    if all(isinstance(each, str) for each in indices):
        known = indices
    pairs = dict(zip(map(files.without_wrappers, known), indices, strict=False))
    tensors = parent.state.get("state_dict", {})
    before = {files.without_wrappers(name): value.shape for name, value in tensors.items()}
    taken, lacks = dict[str, Mapping[str, Any]](), set[str]()
    for name in trained:
        plain, kept = files.without_wrappers(name), after[name].of_parameter if after else set()
        if plain not in pairs or before.get(plain) != shapes[name] or plain in anew:
            continue
        state = there["state"].get(pairs[plain], {})
        if kept <= state.keys():
            taken[name] = state
        else:
            lacks |= kept - state.keys()
    if lacks and not taken:
        raise ValueError(
            f"{where}: the optimiser's state in {parent.checkpoint} lacks "
            f"{', '.join(sorted(lacks))}, which {type(optimizer).__name__} keeps with these "
            f"settings; expected the same settings, or that it begins anew: {_anew(where)}"
        )
    unfit = recorded is None and known is trained and len(known) != len(indices)
    if unfit or not taken:
        raise ValueError(
            f"{where}: the optimiser's state in {parent.checkpoint} is of other parameters "
            f"({len(indices)}, here {len(trained)}); expected that it begins anew: {_anew(where)}"
        )
    # What the optimiser counts in its groups, from the group that its parameters were in.
    told = _told_in_groups(module, optimizer)
    group_of = {each: group for group in there["param_groups"] for each in group["params"]}
    for group in groups:
        name = next((each for each in group["params"] if each in taken), None)
        former = {} if name is None else group_of[pairs[files.without_wrappers(name)]]
        group |= {key: value for key, value in former.items() if key not in told}
    fresh = len(trained) - len(taken)
    rest = f", fresh for {counted(fresh, 'other')}" if fresh else ""
    line = f"optimiser: the state of {len(taken)} parameters taken over{rest}"
    # Of all parameters, since sharded ones are not loaded from less.
    state = {name: taken.get(name, {}) for name in trained}
    return {"state": state, "param_groups": groups}, line


def _kept_of(module: DiffusionModule) -> dict[str, Kept] | None:
    """Return what the optimiser keeps of each parameter, None where it cannot tell."""
    make = module._make_optimizer
    assert make is not None  # Its optimiser was made.
    names = {id(each): name for name, each in module.named_parameters()}
    known: dict[tuple[int, int], Kept] = {}
    found = {}
    for place, (settings, members) in enumerate(module.groups()):
        for each in members:
            like = (place, each.parameter.ndim)
            if like not in known:
                kept = kept_after_a_step(make, settings, each.parameter.ndim)
                if kept is None:
                    return None
                known[like] = kept
            found[names[id(each.parameter)]] = known[like]
    return found


def _same_kind(
    there: Sequence[Mapping[str, Any]],
    here: Sequence[Mapping[str, Any]],
    after: Mapping[str, Kept] | None,
) -> bool:
    """Whether groups are those of one kind of optimiser, by the names of what stands in them.

    Some add names at their first step, as LAMB does.
    """
    beside = BOOKKEEPING | OF_SCHEDULES
    own, theirs = (({*chain(*groups)} - beside) for groups in (here, there))
    if after is None:
        return own <= theirs
    return own <= theirs <= own.union(*(each.of_group for each in after.values()))


def _told_in_groups(module: DiffusionModule, optimizer: Optimizer) -> set[str]:
    """Return the names in groups that are settings of the new command; others are state."""
    make = module._make_optimizer
    assert make is not None  # Its optimiser was made.
    rules = {name for settings, _ in module.groups() for name in settings}
    return options_of(make, optimizer) | rules | BOOKKEEPING | OF_SCHEDULES


def _anew(where: str) -> str:
    return "finetune.optimizer=false" if where.startswith("finetune") else "resume_optimizer=false"


def _optimizer_there(parent: Parent) -> Mapping[str, Any] | None:
    """Return the optimiser's state in a checkpoint, also in one that was joined from pieces."""
    states = parent.state.get("optimizer_states") or [parent.state.get("optimizer_0")]
    found = states[0]
    whole = isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys()
    return found if whole else None


def _loops_at(trainer: Trainer, step: int, scheduled: bool) -> dict[str, Any]:
    """Return the progress that a run of this trainer saves at the end of a step."""
    loops: dict[str, Any] = trainer._checkpoint_connector._get_loops_state_dict()
    if step == 0:
        return loops
    fit, each = loops["fit_loop"], trainer.accumulate_grad_batches
    # The batches so far, in all and in what Lightning calls an epoch, which may have no end.
    batches, length = step * each, trainer.limit_train_batches
    ends = isinstance(length, int)
    epochs = (batches - 1) // length if ends else 0
    over = {"total": 0, "current": int(epochs * length) if epochs else 0}
    # As it is between the end of a batch and its validation.
    progress = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    steps = [progress["step"], progress["zero_grad"]]
    if scheduled:
        steps.append(fit["epoch_loop.scheduler_progress"])
    at_batch = fit["epoch_loop.batch_progress"]
    for which, before in over.items():
        for progressed in steps:
            progressed[which] |= dict.fromkeys(progressed[which], step - before // each)
        at_batch[which] |= dict.fromkeys(at_batch[which], batches - before)
        at_batch[which]["completed"] -= 1
        fit["epoch_progress"][which] |= {"ready": epochs + 1, "started": epochs + 1}
        fit["epoch_progress"][which] |= {"processed": epochs, "completed": epochs}
    # Lightning counts this one up when it goes on.
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    if ends and batches - over["current"] == length:
        begin_next_epoch(fit, step)
    return loops


def _counted_in(each: float, state: dict[str, Tensor]) -> Iterator[str]:
    """Let power-function averages count the steps so far as so many of the new run's each.

    Their time is that of images, as in Karras et al. 2024: a step of twice the images is two.
    """
    powers = {s: name for s, name in averages.averages_in(state).items() if s < averages.WIDEST}
    for start in powers.values() if each != 1 else ():
        updates = state[start + averages.UPDATES]
        state[start + averages.UPDATES] = torch.full_like(updates, _scaled(int(updates), each))
    if powers and each != 1:
        yield (
            f"averages over sigma_rel: each step of that run counts as {each:g} steps of this one, "
            f"since it trained on as many times the images"
        )


def _scaled(updates: int, each: float) -> int:
    """Return a number of updates in others, at least one where there were any."""
    return max(round(updates * each), min(updates, 1))


def _link_snapshots(parent: Parent, out: Path, kept: Mapping[float, str], each: float) -> None:
    """Give the new run the snapshots that its averages go on from, without a copy if it can.

    Where a step counts as ``each`` of the new run's, they are written anew and say so.
    """
    there = averages.snapshots_in(parent.folder / averages.FOLDER)
    for snapshot in there:
        if snapshot.taken.step > parent.step or snapshot.taken.sigma_rel not in kept:
            continue
        target = out / averages.FOLDER / snapshot.file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if each != 1:
            state, told = files.read_safetensors(snapshot.file)
            taken = replace(snapshot.taken, updates=_scaled(snapshot.taken.updates, each))
            with atomic(target) as temporary:
                save_file(state, temporary, metadata=averages.snapshot_metadata(taken, told))
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(snapshot.file, target)
        except OSError:  # Another disk, or one that knows no links.
            with atomic(target) as temporary:
                shutil.copyfile(snapshot.file, temporary)
