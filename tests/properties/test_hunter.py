"""No method is silent: every one acts, where it says, at its price; and the hunter sees who not."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import pytest
import torch

from benchmarks.methods import classes
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, Question, Term
from sag_dit.guidance.term import Asking
from sag_dit.pipelines import guide
from tests.guidance import test_unet_methods as unet
from tests.guidance.every import CELLS, METHODS, MODELS, every
from tests.guidance.hunter import Asked, discord, faults
from tests.pipelines import test_every_method as pipelines
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
NETWORKS: dict[str, ClassConditional] = {**MODELS, "UNet": unet.UNET}
ALL = [*CELLS, *(("UNet", name) for name in unet.TERMS)]


def terms_of(network: str) -> dict[str, Term]:
    """All methods that guide a network, on."""
    return dict(unet.TERMS) if network == "UNet" else every(network)


@pytest.mark.parametrize(("network", "name"), ALL, ids=str)
@pytest.mark.parametrize("index", [0, 9])
def test_no_method_is_silent(network: str, name: str, index: int) -> None:
    assert faults(Asked.at(NETWORKS[network], index), terms_of(network)[name]) == []


@dataclass(frozen=True)
class Spy(Term):
    """Notes what it is told; within a pipeline it knows the prompts of all images."""

    told: list[Question] = field(default_factory=list)

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        self.told.append(ask)
        return torch.zeros_like(base.v)


@cache
def asked_of(family: str) -> Asked:
    """What the network of a tiny pipeline is asked at the last of two steps, of two images."""
    pipe, spy = tiny.BUILD[family](), Spy()
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, spy):
        tiny.draw(pipe, family, [1, 2] if family == "dit" else ["a corgi", "two cats"])
    ask = spy.told[-1]
    assert len(ask.base.x_t) == 2 and ask.noise is not None
    return Asked(ask.base.model, ask.step, ask.base.x_t, ask.base.cond, ask.noise)


@pytest.mark.parametrize(("family", "name"), pipelines.CELLS, ids=str)
def test_no_method_is_silent_in_a_pipeline(family: str, name: str) -> None:
    for term in pipelines.METHODS[name](family):
        assert faults(asked_of(family), term) == [], term


def test_every_class_is_hunted() -> None:
    hunted = {type(term) for network in NETWORKS for term in terms_of(network).values()}
    piped = {name: family for family, name in pipelines.CELLS}
    hunted |= {type(term) for name in piped for term in pipelines.METHODS[name](piped[name])}
    assert hunted == {*classes()}
    assert {name for _, name in ALL} >= {*METHODS}


# --- planted faults -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Honest(Term):
    """Asks about a smaller image, and adds the difference."""

    neutral: ClassVar[float] = 0.0

    def contribution(self, ask: Question) -> Asking:
        base, other = yield ask.base, ask.base.at(ask.base.x_t * 0.9)
        return self.scale * (base.v - other.v)


@dataclass(frozen=True)
class Silent(Honest):
    """Pays for a second pass, and does nothing with it."""

    def contribution(self, ask: Question) -> Asking:
        base, other = yield ask.base, ask.base.at(ask.base.x_t * 0.9)
        return 1e-9 * self.scale * (base.v - other.v)


@dataclass(frozen=True)
class OneImage(Honest):
    """Guides the first image of a batch, and leaves the others."""

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        first = torch.arange(len(base.v)) == 0
        return self.scale * base.v * first[:, None, None, None]


@dataclass(frozen=True)
class Neighbour(Honest):
    """Adds what it finds for one image to the next."""

    def contribution(self, ask: Question) -> Asking:
        base, other = yield ask.base, ask.base.at(ask.base.x_t * 0.9)
        return self.scale * (base.v - other.v).roll(1, dims=0)


@dataclass(frozen=True)
class Scribbler(Honest):
    """Writes into the image that all are asked about."""

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        ask.base.x_t.mul_(0.9)
        return self.scale * base.v


@dataclass(frozen=True)
class Dearer(Honest):
    """Asks once more as soon as a network really answers."""

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        if base.v.any():
            yield (ask.base.at(ask.base.x_t * 0.9),)
        return self.scale * base.v


@dataclass(frozen=True)
class Lingering(Honest):
    """Switched off, it still adds a little."""

    @property
    def off(self) -> bool:
        return False

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        return (self.scale + 1e-3) * base.v


@dataclass(frozen=True)
class Idling(Lingering):
    """Switched off, it adds nothing, but asks."""

    def contribution(self, ask: Question) -> Asking:
        base, other = yield ask.base, ask.base.at(ask.base.x_t * 0.9)
        return self.scale * (base.v - other.v)


@dataclass(frozen=True)
class Restless(Honest):
    """Acts outside its interval."""

    def active(self, step: object) -> bool:
        return not self.off


PLANTED: dict[type[Term], str] = {
    Silent: "on, it leaves images as they are",
    OneImage: "on, it leaves images as they are",
    Neighbour: "on, an image depends on its neighbours",
    Scribbler: "on, it changes the noisy image",
    Dearer: "on, it costs 2 passes and is told to cost others",
    Lingering: "off, it changes images",
    Idling: "off, it costs 2 passes",
    Restless: "outside its interval, it changes images",
}


@pytest.mark.parametrize("network", ["eps", "flow", "UNet"])
def test_an_honest_method_has_no_fault(network: str) -> None:
    assert faults(Asked.at(NETWORKS[network], 5), Honest(0.7)) == []


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("network", ["eps", "flow", "UNet"])
def test_a_planted_fault_is_found(network: str, kind: type[Term]) -> None:
    assert PLANTED[kind] in faults(Asked.at(NETWORKS[network], 5), kind(0.7))


def test_a_planted_fault_of_a_set_is_found() -> None:
    asked = Asked.at(MODELS["eps"], 5)
    assert discord(asked, [Honest(0.7), CFG(2.0)]) == []
    for kind in (Dearer, Scribbler):
        assert discord(asked, [kind(0.7), Honest(0.7), CFG(2.0)])


# --- sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["flow", pytest.param("eps", marks=pytest.mark.slow)])
def test_every_pair_composes(network: str) -> None:
    terms = {type(term): term for term in reversed(every(network).values())}
    asked = Asked.at(MODELS[network], 5)
    wrong = {
        (one.title, other.title): found
        for one, other in itertools.combinations(terms, 2)
        if (found := discord(asked, [terms[one], terms[other]]))
    }
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_random_subsets_compose(network: str) -> None:
    """More than a thousand in all, at any step and in any order."""
    draw, terms = random.Random(network), terms_of(network)
    for _ in range(150):
        names = draw.sample(sorted(terms), draw.randint(3, min(12, len(terms))))
        index = draw.randrange(10)
        wrong = discord(Asked.at(NETWORKS[network], index), [terms[name] for name in names])
        assert wrong == [], (names, index)
