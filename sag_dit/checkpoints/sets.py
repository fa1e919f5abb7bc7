"""The sets of weights in a file: every network in it, and which of them are averages.

A trainer keeps a network under keys of its own choosing (``model``, ``state_dict``, ``net``), below
prefixes in the parameters' names (``module.``, ``model.diffusion_model.``), and averages beside it
(``ema``, ``model_ema``, ``ema_model.``). None of these names is listed here: a network is found by
the names of its own parameters, and an average by a word in the name of its place.
"""

from __future__ import annotations

import logging
import re
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sag_dit.checkpoints.files import without_wrappers
from sag_dit.models.family import Family, State, families

log = logging.getLogger(__name__)

DEPTH = 5
"""So many keys or prefixes may stand above a network."""
AVERAGE = re.compile(r"(?i:(?<![a-z])(?:ema|averag|avg|swa|shadow|polyak))|EMA|Ema")
"""What the place of averaged weights is called by."""
OPTIMISER = re.compile(r"(?i)(optimi[sz]er|optim|opt|exp_avg|grads?)(?![a-z])")
"""What an optimiser's state is called, which may have the network's names too."""
ABSENT = torch.empty(0)


class WeightSet(NamedTuple):
    """A set of weights: the keys and prefixes above it, and its own entries.

    An average that cannot be read has no entries.

    Example:
        >>> WeightSet("ema.", {}).averaged, WeightSet("model.", {}).averaged
        (True, False)
    """

    where: str
    state: State

    @property
    def averaged(self) -> bool:
        """Whether its place is called an average's."""
        return AVERAGE.search(self.where) is not None


def sets_in(value: Mapping[Any, Any]) -> list[WeightSet]:
    """Return the networks of known families in a file's content, in the order of the file."""
    return list(_sets(value, "", tuple(families().values())))


def _sets(value: Mapping[Any, Any], where: str, known: Collection[Family]) -> Iterator[WeightSet]:
    """Yield the networks among a mapping's own tensors, then those in the mappings within."""
    tensors = {
        without_wrappers(name): item
        for name, item in value.items()
        if isinstance(name, str) and isinstance(item, Tensor)
    }
    networks = list(_networks(tensors, where, known))
    yield from networks
    yield from _unread_averages(tensors, where, networks, known)
    for name, item in value.items():
        place = f"{where}{name}."
        if not isinstance(name, str) or place.count(".") > DEPTH or OPTIMISER.match(name):
            continue
        if isinstance(item, Mapping):
            yield from _sets(item, place, known)
        elif isinstance(item, list) and item and all(isinstance(each, Tensor) for each in item):
            # Such as shadow_params of diffusers' EMAModel: without names nothing tells the order.
            found = WeightSet(place, {})
            yield from [found] if found.averaged else []


def _networks(state: State, where: str, known: Collection[Family]) -> Iterator[WeightSet]:
    """Yield the networks in a state dict by the prefixes of their names."""
    if _recognised(state, known):
        yield WeightSet(where, state)
    elif where.count(".") <= DEPTH:
        for first, part in _by_first_word(state).items():
            yield from _networks(part, f"{where}{first}.", known)


def _unread_averages(
    state: State, where: str, networks: Collection[WeightSet], known: Collection[Family]
) -> Iterator[WeightSet]:
    """Yield averages in which no network was found.

    Those of latent-diffusion's LitEma have the names of the network beside them, without dots.
    """
    whole = WeightSet(where, {}).averaged
    for first, part in ({"": state} if whole else _by_first_word(state)).items():
        place = f"{where}{first}." if first else where
        found = WeightSet(place, {})
        there = any(network.where.startswith(place) for network in networks)
        if not found.averaged or there or all(tensor.ndim < 2 for tensor in part.values()):
            continue
        for network in networks:
            prefix = network.where.removeprefix(where).partition(".")[2]
            dotless = {name: (prefix + name).replace(".", "") for name in network.state}
            shadow = {name: part[short] for name, short in dotless.items() if short in part}
            if _recognised(shadow, known):
                found = WeightSet(place, shadow)
        yield found


def _by_first_word(state: State) -> dict[str, State]:
    parts: dict[str, State] = {}
    for name, tensor in state.items():
        first, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(first, {})[rest] = tensor
    return parts


def _recognised(state: State, known: Collection[Family]) -> bool:
    """Whether the names are those of a network; an average may lack what is never trained."""
    return any(
        family.recognises(ChainMap(state, dict.fromkeys(family.fixed, ABSENT))) for family in known
    )


def chosen(found: Collection[WeightSet], ema: bool, path: Path) -> State:
    """Return the averaged or the raw weights of a file that holds both, or either.

    What is never trained may be missing from an average and is taken from the raw weights.

    Raises:
        ValueError: the file lacks them, or holds an average that cannot be read.
    """
    # Each set is an average or raw by the name of its place.
    raw = [each for each in found if not each.averaged]
    averaged = [each for each in found if each.averaged and each.state]
    wanted = averaged if ema else raw
    if not wanted:
        unread = next((each.where for each in found if each.averaged), None) if ema else None
        raise ValueError(
            no_such_kind(path, ema)
            if unread is None
            else f"{path}: its averaged weights, {unread.rstrip('.')}, have not the names of a "
            f"network's parameters and are not read; save the averaged network's own state_dict "
            f"with torch.save and pass that file"
        )
    if len(wanted) > 1:
        places = ", ".join(each.where.rstrip(".") or "the top level" for each in wanted)
        log.warning("%s: of the weights in %s the first are taken", path, places)
    # The positions of a DiT, for example, are no trained weights, which some averages leave out.
    state, beside = wanted[0].state, raw[0].state if raw else {}
    fixed = {name for family in families().values() for name in family.fixed}
    return {**{name: beside[name] for name in fixed & beside.keys()}, **state}


def no_such_kind(path: Path, ema: bool) -> str:
    """Return what to say of a file that has only the other kind of weights."""
    kind, remedy = ("averaged (EMA)", "ema=false") if ema else ("raw", "ema=true")
    return f"ema={str(ema).lower()}: {path} holds no {kind} weights; use {remedy}"
