"""Parameter groups by name: which parameters are trained with other settings than the rest.

A rule looks at one parameter and returns the settings of the optimiser that are its own. Rules act
in order, and parameters of the same settings make a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from sag_dit.bounds import shown
from sag_dit.denoiser import Denoiser
from sag_dit.messages import nearest
from sag_dit.raised import failure
from sag_dit.training.finetune import matching

LR_SCALE = "lr_scale"
"""The one setting that is not the optimiser's own: it multiplies the learning rate."""

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter that is trained, as rules see it.

    Attributes:
        name: its name in the network, such as ``blocks.0.attn.qkv.weight``.
        parameter: the parameter itself.
        module: the module that holds it.
        depth: 0 before the first block, k in block k, counted from 1.
        last: the depth of what comes behind the last block.

    Example::

        rates = {each.name: each.depth / each.last for each in trained_parameters(denoiser)}
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module
    depth: int
    last: int

    @property
    def in_block(self) -> bool:
        """Whether it belongs to one of the network's blocks."""
        return 0 < self.depth < self.last


Rule: TypeAlias = Callable[[Trained], Mapping[str, Any] | None]
"""Returns the settings of a parameter, such as ``{"weight_decay": 0.0}``, or nothing.

They are those of the optimiser's groups, and ``lr_scale``, which multiplies the learning rate.
"""

Group: TypeAlias = tuple[Mapping[str, Any], list[Trained]]
"""Settings of a group that are not those of the optimiser, and its parameters."""


def trained_parameters(denoiser: Denoiser, objective: object = None) -> list[Trained]:
    """Return the parameters that are trained, in their order.

    What a network registers before its blocks is taken to come before them, the rest behind. Those
    of an objective that is a module come last, as ``objective.NAME``, behind the last block.
    """
    own = objective if isinstance(objective, nn.Module) else nn.Module()
    blocks = list(getattr(denoiser.network, "blocks", ()))
    place = {id(p): k for k, block in enumerate(blocks, 1) for p in block.parameters()}
    owners = {
        id(p): module
        for module in (*denoiser.modules(), *own.modules())
        for p in module.parameters(recurse=False)
    }
    last, behind, found = len(blocks) + 1, False, []
    for name, parameter in denoiser.named_parameters():
        behind = behind or id(parameter) in place
        depth = place.get(id(parameter), last if behind else 0)
        if parameter.requires_grad:
            owner = owners[id(parameter)]
            found.append(Trained(name.removeprefix("network."), parameter, owner, depth, last))
    return found + [
        Trained(f"objective.{name}", p, owners[id(p)], last, last)
        for name, p in own.named_parameters()
        if p.requires_grad
    ]


def no_decay(each: Trained) -> Mapping[str, Any]:
    """Return no weight decay for biases, for gains of norms and for embeddings.

    These are parameters of at most one dimension, those of norms and ``nn.Embedding``, and those
    whose own name says bias or embed, such as a learned ``pos_embed``.
    """
    own = each.name.rpartition(".")[2]
    spared = (
        each.parameter.ndim <= 1
        or isinstance(each.module, (*NORMS, nn.Embedding))
        or "bias" in own
        or "embed" in own
    )
    return {"weight_decay": 0.0} if spared else {}


@dataclass(frozen=True)
class LayerDecay:
    """Layer-wise decay of the rate: lr factor^(depth of the output - depth).

    The output layer keeps the rate, the last block has factor times it, and so on down to the
    embeddings.

    Raises:
        ValueError: a factor that is not above 0 and below 1.

    Source: Clark et al. 2020 (ELECTRA, arXiv 2003.10555), appendix A; Bao et al. 2021 (BEiT, arXiv
    2106.08254).

    Example:
        >>> LayerDecay(0.75).factor
        0.75
    """

    factor: float

    def __post_init__(self) -> None:
        if not (_is_number(self.factor) and 0 < self.factor < 1):
            raise ValueError(
                f"layer_decay: {shown(self.factor)}: expected a number above 0 and below 1"
            )

    def __call__(self, each: Trained) -> Mapping[str, Any]:
        """Return the share of the rate that a parameter has.

        Raises:
            ValueError: the network has no blocks.
        """
        if each.last == 1:
            raise ValueError(
                f"param_groups: layer_decay: {shown(self.factor)}: the network has no blocks by "
                f"which depth is told, and all rates would change alike: expected a network that "
                f"lists them in self.blocks, or another optimizer.lr"
            )
        return {LR_SCALE: self.factor ** (each.last - each.depth)}


@dataclass(frozen=True)
class Match:
    """Settings of all parameters whose names match one of some patterns.

    ``patterns`` are as those of ``freeze``: with ``*``, ``?`` and ``[...]``, where the name of a
    module stands for all in it.

    Raises:
        ValueError: no pattern, or no setting.

    Example:
        >>> Match(["y_embedder"], {"lr": 1e-3}).patterns
        ['y_embedder']
    """

    patterns: Sequence[str]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        listed = not isinstance(self.patterns, str) and isinstance(self.patterns, Sequence)
        if not (listed and self.patterns and all(isinstance(p, str) for p in self.patterns)):
            raise ValueError(
                f"match: {shown(self.patterns)}: expected names of parameters or patterns, such as "
                f"blocks.*.attn"
            )
        if not self.settings:
            raise ValueError(
                f"match: {shown(self.patterns)}: expected a setting beside it, such as lr, "
                f"lr_scale or weight_decay"
            )

    def __call__(self, each: Trained) -> Mapping[str, Any]:
        """Return the settings, if the parameter matches."""
        found = any(matching([each.name], pattern) for pattern in self.patterns)
        return self.settings if found else {}


def rule_of(entry: Any) -> Rule:
    """Return the rule that an entry of ``param_groups`` stands for.

    An entry is ``"no_decay"``, ``{"layer_decay": factor}``, ``{"match": pattern, SETTING: value}``
    with one pattern or a list of them, or a rule of one's own.

    Raises:
        ValueError: none of these.
    """
    match entry:
        case "no_decay":
            return no_decay
        case {"layer_decay": factor, **more} if not more:
            return LayerDecay(factor)
        case {"match": patterns, **settings}:
            named = {str(name): value for name, value in settings.items()}
            return Match([patterns] if isinstance(patterns, str) else patterns, named)
        case _ if callable(entry):
            rule: Rule = entry
            return rule
    raise ValueError(
        f"{shown(entry)}: expected no_decay, {{layer_decay: 0.8}}, {{match: PATTERN, lr: 1e-4}} "
        f"or {{_target_: my_file.MyRule}}"
    )


def rules_of(entries: Sequence[Any]) -> list[Rule]:
    """Return the rules that the entries of ``param_groups`` stand for.

    Raises:
        ValueError: an entry that is no rule; its place is told.
    """
    rules = []
    for place, entry in enumerate(entries):
        try:
            rules.append(rule_of(entry))
        except ValueError as error:
            raise ValueError(f"param_groups[{place}]: {error}") from None
    return rules


def grouped(
    parameters: Sequence[Trained],
    entries: Sequence[Any],
    defaults: Mapping[str, Any],
    own: Rule | None = None,
) -> list[Group]:
    """Return the groups that rules make of parameters, in the order of their first parameters.

    ``defaults`` are the settings of the optimiser, ``own`` the rule that it brings itself, which
    acts first.

    Raises:
        ValueError: a setting that the optimiser does not have, or a rule that changes nothing.
    """
    rules = rules_of(entries)
    for place, rule in enumerate(rules):
        if isinstance(rule, Match):  # Before it is told that it fits nothing.
            _refuse_unknown(rule.settings, defaults, f"param_groups[{place}]")
    acted = [False] * len(rules)
    groups: dict[str, Group] = {}
    for each in parameters:
        settings = _added({}, own(each), defaults, "optimizer") if own else {}
        for place, rule in enumerate(rules):
            where = f"param_groups[{place}]"
            after = _added(settings, _asked(rule, each, where), defaults, where)
            # What is said again is no change.
            acted[place] = acted[place] or {**defaults, **after} != {**defaults, **settings}
            settings = after
        key = repr(sorted(settings.items()))
        groups.setdefault(key, (settings, []))[1].append(each)
    for place, has in enumerate(acted):
        if not has:
            names = ", ".join(each.name for each in parameters[:3])
            raise ValueError(
                f"param_groups[{place}]={shown(_told(entries[place]))} changes nothing: it fits no "
                f"parameter (they are called {names}, ...), or says what they have anyway"
                f"{_hint(rules[place], parameters, defaults)}; mend it or leave it out"
            )
    return list(groups.values())


def _asked(rule: Rule, each: Trained, where: str) -> Mapping[str, Any] | None:
    """Return what a rule says of a parameter.

    Raises:
        ValueError: it raises an error; it is named, and the parameter.
    """
    try:
        return rule(each)
    except Exception as error:  # Whatever a rule of somebody's meets.
        if isinstance(rule, LayerDecay):
            raise
        raise ValueError(
            f"{where}: at the parameter {each.name} {_told(rule)} fails with {failure(error)}"
        ) from error


def _hint(rule: Rule, parameters: Sequence[Trained], defaults: Mapping[str, Any]) -> str:
    if rule is no_decay and not defaults.get("weight_decay"):
        return ": optimizer.weight_decay is 0"
    patterns = rule.patterns if isinstance(rule, Match) else ()
    within = (p for p in patterns if any(p in each.name for each in parameters))
    held = next((p for p in within if not any(matching([e.name], p) for e in parameters)), None)
    return "" if held is None else f": names that hold {held} are matched by '*{held}*'"


def _told(entry: Any) -> Any:
    own = getattr(entry, "func", entry)  # Of a function that has been given arguments.
    return getattr(own, "__name__", type(own).__name__) if callable(own) else own


def _added(
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None,
    defaults: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """Return settings with those of one more rule; ``lr_scale`` is worked into the rate.

    Raises:
        ValueError: a setting that the optimiser does not have, or a rate that is none.
    """
    if more is None:
        return dict(settings)
    if not isinstance(more, Mapping):
        raise ValueError(
            f"{where}: a rule returned {shown(more)}: expected a mapping of settings, such as "
            f"{{'weight_decay': 0.0}}"
        )
    _refuse_unknown(more, defaults, where)
    after = {**settings, **{name: value for name, value in more.items() if name != LR_SCALE}}
    for name in ("lr", LR_SCALE, "weight_decay"):
        value = more.get(name, 0.0)
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"{where}: {name}={shown(value)}: expected a number, 0 or more")
    if LR_SCALE in more:
        rate = after.get("lr", defaults.get("lr"))
        if rate is None:
            raise ValueError(
                f"{where}: the optimiser finds its own rate, of which there is no share; set "
                f"optimizer.lr"
            )
        after["lr"] = float(rate) * more[LR_SCALE]
    return after


def _refuse_unknown(names: Iterable[str], defaults: Mapping[str, Any], where: str) -> None:
    """Refuse settings that the optimiser does not have.

    Raises:
        ValueError: such a name, and those that are close.
    """
    known = sorted({*defaults, LR_SCALE})
    for name in names:
        if name not in known:
            raise ValueError(
                f"{where}: {name}: the optimiser has no such setting; expected one of "
                f"{', '.join(known)}{nearest(name, known)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def describe_groups(groups: Sequence[Group], defaults: Mapping[str, Any]) -> str:
    """Return a line for each group: how much is in it, how it is trained, and its first names."""
    lines = ["parameter groups:"]
    for settings, members in groups:
        told = {"lr": defaults.get("lr"), "weight_decay": defaults.get("weight_decay"), **settings}
        values = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {shown(value)}"
            for name, value in told.items()
            if value is not None
        )
        count = sum(each.parameter.numel() for each in members)
        names = ", ".join(each.name for each in members[:2])
        more = ", ..." if len(members) > 2 else ""
        lines.append(f"  {count:,} in {len(members)} tensors: {values} ({names}{more})")
    return "\n".join(lines)
