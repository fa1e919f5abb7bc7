"""Optimisers: Muon with AdamW for the rest, averages of an optimiser's own, and what is refused.

Any class of torch, timm or a user's own is an optimiser here; this file holds what those lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sag_dit.bounds import shown
from sag_dit.messages import nearest
from sag_dit.raised import unknown_argument
from sag_dit.training.param_groups import Group, Trained

MakeOptimizer: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimiser of parameters or of groups of them, such as ``partial(AdamW, lr=1e-4)``."""

PACKAGES = ("bitsandbytes", "schedulefree")
"""What optimisers come from that are no part of an installation, by its name on PyPI."""


CLOSURE = (
    "expected step(self, closure=None) that calls it, since it computes the gradients: "
    "loss = closure() under torch.enable_grad()"
)
"""What is expected of an optimiser's step."""

KINDS: Mapping[bool, Callable[..., Optimizer]] = {True: torch.optim.Muon, False: torch.optim.AdamW}
"""What trains a group of :class:`Muon`, by its ``use_muon``."""


class Muon(Optimizer):
    """Muon for the matrices of the blocks, AdamW for all else, as one optimiser.

    A matrix moves along its momentum with all singular values made one, computed by Newton-Schulz
    iterations:

        M <- momentum M + (1 - momentum) G,    W <- W - lr s NS(M) - lr weight_decay W

    With ``adjust_lr_fn="match_rms_adamw"``, s = 0.2 sqrt(max(rows, columns)): updates are as large
    as AdamW's, so that ``lr`` and ``weight_decay`` serve both. With ``"original"`` s is
    sqrt(max(1, rows / columns)), whose rates are larger; ``adamw_lr`` is then the rate of the rest.
    The steps themselves are ``torch.optim.Muon`` and ``torch.optim.AdamW``.

    A group is trained by Muon if its ``use_muon`` is true. :meth:`group_rule` says so of the weight
    matrices (two dimensions) in the network's blocks. Embeddings, the output layer, biases, gains
    and filters of convolutions are AdamW's.

    Raises:
        ValueError: a value out of its range, or a tensor under Muon that is no matrix.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025 (arXiv
    2502.16982).

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> groups = [{"params": [layer.weight], "use_muon": True}, {"params": [layer.bias]}]
        >>> [group["use_muon"] for group in Muon(groups, lr=1e-3).param_groups]
        [True, False]
    """

    key = "muon"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        fused: bool | None = None,
    ) -> None:
        self._adamw_lr = adamw_lr
        shared = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        steps = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients}
        self._settings: dict[bool, dict[str, Any]] = {
            True: {**shared, **steps, "momentum": momentum, "nesterov": nesterov}
            | {"adjust_lr_fn": adjust_lr_fn},
            False: {**shared, "betas": betas, "fused": fused},
        }
        # Values are checked by torch, also those of which no parameter makes use.
        for muon in KINDS:
            self._part(muon, [Parameter(torch.zeros(1, 1))])
        defaults = {**self._settings[True], **self._settings[False], "use_muon": False}
        super().__init__(params, defaults)
        self._share()

    def _part(self, muon: bool, params: Iterable[Any]) -> Optimizer:
        return KINDS[muon](params, **self._settings[muon])

    def group_rule(self, each: Trained) -> Mapping[str, Any]:
        """Return which of the two trains a parameter, and the rate of the rest if it has one."""
        if each.in_block and each.parameter.ndim == 2 and not isinstance(each.module, nn.Embedding):
            return {"use_muon": True}
        return {} if self._adamw_lr is None else {"lr": self._adamw_lr}

    def check_groups(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups of which none is Muon's.

        Raises:
            ValueError: with a remedy.
        """
        if not any(each.get("use_muon") for each in settings):
            raise ValueError(
                "optimizer=muon: no matrix that is trained is in a block of the network, so that "
                "AdamW would train all: expected optimizer=adamw, a network that lists its blocks "
                "in self.blocks, or param_groups=[{match: PATTERN, use_muon: true}]"
            )

    def _share(self) -> None:
        """Build torch's two optimisers over the groups and the state of this one."""
        self._parts: list[Optimizer] = []
        for muon in KINDS:
            groups = [each for each in self.param_groups if each["use_muon"] is muon]
            if groups:
                # An optimiser keeps the mappings it is given, so that schedules reach it.
                part = self._part(muon, groups)
                part.state = self.state
                self._parts.append(part)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which AdamW trains unless it says ``use_muon``."""
        super().add_param_group(param_group)
        if hasattr(self, "_parts"):
            self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from: a state, and the settings of both optimisers."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_settings": self._settings, "_adamw_lr": self._adamw_lr}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a state, as ``load_state_dict`` does, whose groups are new mappings."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both, and return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def missing(target: str, where: str = "optimizer") -> None:
    """Refuse an optimiser whose package is known but not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    package = target.partition(".")[0]
    if package in PACKAGES and find_spec(package) is None:
        raise ValueError(
            f"{where}: {target} needs {package}, which is not installed; pip install {package}"
        )


def stand_in(make: MakeOptimizer) -> Optimizer:
    """Return the optimiser of a parameter that stands for the network's, to look at.

    Raises:
        ValueError: it cannot be made, or cannot train a network here; the reason is told.
    """
    try:
        _refuse_missing_of_timm(make)
        made = make([Parameter(torch.zeros(2, 2))])
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        told = str(error).removeprefix("optimizer: ")
        raise ValueError(f"optimizer: {told}{_near(make, error)}") from error
    name = type(made).__name__
    if not isinstance(made, Optimizer):
        raise ValueError(f"optimizer: makes a {name}; expected a subclass of torch.optim.Optimizer")
    _refuse_unused(make, made)
    if isinstance(made, torch.optim.SparseAdam):
        raise ValueError(
            "optimizer: SparseAdam takes sparse gradients, and those of networks here are dense; "
            "expected another, such as optimizer=adamw"
        )
    if isinstance(made, torch.optim.LBFGS) or getattr(made, "is_second_order", False):
        raise ValueError(
            f"optimizer: {name} needs more than a gradient of each batch, which a run does not "
            f"compute; expected another, such as optimizer=adamw"
        )
    _refuse_no_closure(make, made)
    return made


def _near(make: MakeOptimizer, error: Exception) -> str:
    """Return a sentence that names what is close to an argument that an optimiser does not take."""
    unknown = unknown_argument(error)
    if unknown is None:
        return ""
    kind: Any = getattr(make, "func", make)
    if _of_timm(make):
        from timm.optim import get_optimizer_info

        kind = get_optimizer_info(_bare(getattr(make, "keywords", {})["opt"])).opt_class
    return nearest(unknown, signature(kind).parameters) if callable(kind) else ""


def _bare(name: str) -> str:
    """Return timm's name of an optimiser without what goes around it, such as lookahead."""
    return name.lower().rpartition("_")[2]


def _refuse_no_closure(make: MakeOptimizer, made: Optimizer) -> None:
    """Refuse an optimiser whose step does not call the closure that computes the gradients.

    What else a step may lack here, such as a device, is told by :func:`check_steps`.

    Raises:
        ValueError: it takes none, or does not call it.
    """
    where = f"optimizer: {type(made).__module__}.{type(made).__qualname__}.step"
    takes = signature(made.step).parameters
    if "closure" not in takes and all(e.kind is not e.VAR_KEYWORD for e in takes.values()):
        raise ValueError(f"{where} takes no closure; {CLOSURE}")
    try:
        called = _step(make, {}, Parameter(torch.zeros(2, 2)))
    except Exception:  # Whatever an optimiser needs a device or larger tensors for.
        return
    if not called:
        raise ValueError(f"{where} does not call its closure; {CLOSURE}")


def _step(make: MakeOptimizer, settings: Mapping[str, Any], parameter: Parameter) -> bool:
    """Take a step with a parameter as Lightning does; whether that has asked for its gradient."""
    calls = []

    def closure() -> Any:
        calls.append(1)
        parameter.grad = torch.ones_like(parameter)
        return torch.zeros((), device=parameter.device)

    optimizer = make([{"params": [parameter], **settings}])
    if averages_itself(optimizer):
        begin(optimizer)
    optimizer.step(closure=closure)
    return bool(calls)


def check_steps(make: MakeOptimizer, groups: Sequence[Group], device: torch.device) -> None:
    """Take a step on a device with a parameter of each group, before anything is trained.

    Raises:
        ValueError: an optimiser or its settings cannot; torch's reason is told.
    """
    for settings, members in groups:
        like = members[0].parameter
        parameter = Parameter(torch.zeros(like.shape, dtype=like.dtype, device=device))
        try:
            _step(make, settings, parameter)
        except Exception as error:  # Whatever an optimiser of somebody's meets.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            name = getattr(getattr(make, "func", make), "__name__", "it")
            raise ValueError(
                f"optimizer: {name} cannot take a step on {device} with its settings ({reason}); "
                f"expected others, or another optimiser such as optimizer=adamw"
            ) from error


def _of_timm(make: MakeOptimizer) -> bool:
    function = getattr(make, "func", make)
    return getattr(function, "__module__", "") == "timm.optim._optim_factory"


def _refuse_missing_of_timm(make: MakeOptimizer) -> None:
    """Refuse a name that timm does not know, or whose package is not installed.

    Raises:
        ValueError: the reason and the remedy.
    """
    name = getattr(make, "keywords", {}).get("opt")
    if not _of_timm(make) or not isinstance(name, str):
        return
    from timm.optim import get_optimizer_info, list_optimizers

    bare = _bare(name)
    if bare not in list_optimizers():
        close = get_close_matches(bare, map(str, list_optimizers()), n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "see timm.optim.list_optimizers()"
        )
        raise ValueError(f"optimizer.opt={name}: timm has no such optimiser; {hint}")
    kind = get_optimizer_info(bare).opt_class
    if isinstance(kind, str):
        missing(kind)


def _refuse_unused(make: MakeOptimizer, made: Optimizer) -> None:
    """Refuse arguments that timm's factory would drop without a word.

    Raises:
        ValueError: such an argument.
    """
    if not _of_timm(make):
        return
    inner = _inner(made)
    takes = {*inner.defaults, *signature(type(inner)).parameters, "opt", "foreach"}
    for name, value in getattr(make, "keywords", {}).items():
        if name not in takes and value is not None:
            told = f"optimizer.{name}={shown(value)}: {type(inner).__name__} makes no use of it"
            raise ValueError(f"{told}; leave it out, and set groups by param_groups")


def check_sharded(
    make: MakeOptimizer, settings: Sequence[Mapping[str, Any]], mesh: DeviceMesh
) -> None:
    """Take a step with a sharded tensor for each group, which not every optimiser can.

    Raises:
        ValueError: it cannot; the reason and the remedy are told.
    """
    rows = 2 * mesh.size()
    groups: list[dict[str, Any]] = []
    for each in settings:
        whole = torch.ones(rows, 2, device=mesh.device_type)
        parameter = Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        parameter.grad = torch.ones_like(parameter)
        groups.append({"params": [parameter], **each})
    try:
        optimizer = make(groups)
        if averages_itself(optimizer):
            begin(optimizer)
        optimizer.step()
        if averages_itself(optimizer):
            optimizer.eval()  # type: ignore[attr-defined]
    except Exception as error:  # Whatever an optimiser meets in a tensor that is not whole.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"optimizer: it cannot train weights that are split over ranks ({reason}); expected "
            f"trainer=ddp, or another such as optimizer=adamw"
        ) from error


@dataclass(frozen=True)
class Kept:
    """The names of what an optimiser keeps after a step: of a parameter, and in its group.

    Example:
        >>> sorted(kept_after_a_step(torch.optim.Adam, {}, dimensions=2).of_parameter)
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    of_parameter: set[str]
    of_group: set[str]


def kept_after_a_step(
    make: MakeOptimizer, settings: Mapping[str, Any], dimensions: int
) -> Kept | None:
    """Return what an optimiser keeps after a step, None where one cannot be taken here."""
    parameter = Parameter(torch.zeros((2,) * dimensions))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make([{"params": [parameter], **settings}])
        if averages_itself(optimizer):
            begin(optimizer)
        optimizer.step()
        return Kept(set(optimizer.state[parameter]), set(optimizer.param_groups[0]))
    except Exception:  # Whatever an optimiser needs a device or larger tensors for.
        return None


def options_of(make: MakeOptimizer, optimizer: Optimizer) -> set[str]:
    """Return the names of what an optimiser is told: the arguments of its class and of its maker.

    What else stands in its groups it counts itself there, as the schedule-free ones do.
    """
    kinds = [*type(optimizer).__mro__, *type(_inner(optimizer)).__mro__]
    own = [kind for kind in kinds if issubclass(kind, Optimizer)]
    return {name for kind in own for name in signature(kind).parameters} | {
        *getattr(make, "keywords", {})
    }


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that timm's Lookahead goes around, or the one that is given."""
    inner: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner


def averages_itself(optimizer: Optimizer) -> bool:
    """Whether an optimiser keeps the average that is to be used, as the schedule-free ones do.

    Such a one switches the weights between training and use by ``train()`` and ``eval()``.

    Source: Defazio et al. 2024, "The Road Less Scheduled" (arXiv 2405.15682).
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def begin(optimizer: Optimizer) -> None:
    """Switch an optimiser that averages by itself to training, with nothing in its state.

    Asked for the state of a parameter, it would keep an empty one. A state that is not empty is
    taken to be complete where sharded ones are loaded, and those of the parameters would be lost.
    """
    optimizer.train()  # type: ignore[attr-defined]
    for parameter in [each for each, state in optimizer.state.items() if not state]:
        del optimizer.state[parameter]


@torch.no_grad()
def copy_averages(optimizer: Optimizer, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Copy the averages that an optimiser keeps of modules into others of the same shape.

    The weights come back bit by bit: ``train()`` alone would round them, so that a run would depend
    on how often it is looked at.
    """
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.clone() for weight in trained]
    optimizer.eval()  # type: ignore[attr-defined]
    # One by one, since torch cannot copy a list of sharded tensors.
    for module, average in pairs:
        for weight, copied in zip(module.parameters(), average.parameters(), strict=True):
            copied.copy_(weight)
    optimizer.train()  # type: ignore[attr-defined]
    for weight, kept in zip(trained, before, strict=True):
        weight.copy_(kept)


@contextmanager
def in_proportion(optimizer: Optimizer) -> Iterator[None]:
    """Check that the schedule that is made within keeps the rates of groups in proportion.

    Raises:
        ValueError: it sets rates of its own, as OneCycleLR and CyclicLR do.
    """
    before = [_number(group["lr"]) for group in optimizer.param_groups]
    yield
    after = [_number(group["lr"]) for group in optimizer.param_groups]
    for rate, scheduled in zip(before, after, strict=True):
        expected, found = scheduled * before[0], after[0] * rate
        if abs(expected - found) > 1e-6 * max(abs(expected), abs(found)):
            raise ValueError(
                "schedule: it gives all groups of parameters rates of its own, which "
                "optimizer and param_groups set apart; expected one that multiplies them, such as "
                "schedule=cosine, or a list of rates, one for each group"
            )


def _number(rate: Any) -> float:
    return float(rate.detach() if isinstance(rate, Tensor) else rate or 0.0)


def refuse_measured(schedule: object) -> None:
    """Refuse a schedule, or what makes one, that follows a measured loss and not the steps.

    Raises:
        ValueError: it is one.
    """
    made = getattr(schedule, "func", schedule)
    if issubclass(made if isinstance(made, type) else type(made), ReduceLROnPlateau):
        raise ValueError(
            "schedule: ReduceLROnPlateau follows what validation measures, so that a run would "
            "depend on when it is looked at; expected a schedule of steps, such as "
            "schedule=cosine, or a lower optimizer.lr in a run that goes on by resume_from"
        )


def check_alone(
    optimizer: Optimizer,
    schedule: Callable[[Optimizer], LRScheduler] | None,
    ema_decay: float | None,
    further: Sequence[float] = (),
) -> None:
    """Refuse a schedule that follows a measured loss, and what an optimiser does itself.

    One that averages by itself needs no schedule and no other averages.

    Raises:
        ValueError: one of them is set.
    """
    refuse_measured(schedule)
    if not averages_itself(optimizer):
        return
    told = f"beside {type(optimizer).__name__}, which"
    if schedule is not None:
        warm = "; to warm up, set optimizer.warmup_steps" if _warms(optimizer) else ""
        raise ValueError(
            f"schedule: {told} takes the place of schedules: expected schedule=constant{warm}"
        )
    if ema_decay is not None:
        raise ValueError(
            f"ema.decay={ema_decay}: {told} averages the weights itself, and that average is what "
            f"is drawn with and saved: expected ema.decay=null"
        )
    if further:
        raise ValueError(
            f"ema.further={list(further)}: {told} averages the weights itself; these "
            f"would be averages of the points where it takes gradients: leave ema.further out"
        )


def _warms(optimizer: Optimizer) -> bool:
    return any("warmup_steps" in group for group in optimizer.param_groups)


def parameters_of(groups: Sequence[tuple[Mapping[str, Any], Sequence[Trained]]]) -> list[Any]:
    """Return groups as optimisers take them; one without settings as its parameters alone."""
    if len(groups) == 1 and not groups[0][0]:
        return [each.parameter for each in groups[0][1]]
    return [
        {"params": [each.parameter for each in members], **settings} for settings, members in groups
    ]
