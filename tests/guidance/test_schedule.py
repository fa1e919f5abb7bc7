"""When terms act and how strongly, what they are called on disk, and what a set costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial

import pytest
import torch

from sag_dit.guidance import (
    CFG,
    PAG,
    SAG,
    SEG,
    BlurGuidance,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.term import Asking
from sag_dit.process import Flow, Step
from sag_dit.sampler import DDIM, HeunFlow
from sag_dit.sampler.diffusers import DiffusersSampler
from tests.guidance.every import MODELS, batch, every, guided
from tests.guidance.reference import step_at

# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "unit", "acts"),
    [
        ((333.0, 777.0), "t", [777, 666, 555, 444]),
        ((None, 222.0), "t", [222, 111, 0]),
        ((0.0, 222.0), "t", [222, 111]),
        ((777.0, None), "t", [999, 888]),
        ((None, None), "t", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ((0.28, 2.9), "sigma", [444, 333, 222, 111]),
        ((5.0, math.inf), "sigma", [999, 888, 777, 666]),
    ],
)
def test_intervals_of_noise_include_their_upper_bound(
    interval: tuple[float | None, float | None], unit: str, acts: list[int]
) -> None:
    term = CFG(2.0, interval=interval, interval_in=unit)  # type: ignore[arg-type]
    process = MODELS["eps"].process
    steps = [step_at(process, i) for i in range(10)]
    assert [int(step.level.t) for step in steps if term.active(step)] == acts
    bound = steps[4].level
    exact = bound.sigma / bound.alpha if unit == "sigma" else bound.t
    assert replace(term, interval=(None, exact)).active(steps[4])
    assert not replace(term, interval=(exact, None)).active(steps[4])


def test_pure_noise_of_a_flow_is_beyond_every_finite_sigma() -> None:
    first = step_at(Flow(), 0)
    assert first.level.alpha == 0
    assert not CFG(2.0, interval=(0.0, 1e9), interval_in="sigma").active(first)
    assert CFG(2.0, interval=(1e9, None), interval_in="sigma").active(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (2.0, 1.0), "interval_in": "t"}, r"\(low, high\) with low <= high, in t"),
        ({"interval_in": "steps"}, "interval_in='steps': expected one of progress, t, sigma"),
        ({"interval": 3.0}, r"interval=3.0: expected two numbers, \(start, stop\)"),
        ({"interval": (0, 1, 2), "interval_in": "t"}, r"expected two numbers, \(low, high\)"),
        ({"schedule": "square"}, "schedule='square': expected constant, linear, cosine"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFG(2.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (None, 1.0)])
def test_shares_are_no_times_of_a_thousand(interval: tuple[float | None, float]) -> None:
    """Such as the default bounds, of progress, where interval_in=t is set alone."""
    for term in every("flow").values():
        replace(term, interval=interval, interval_in="t").check(MODELS["flow"])
    for term in every("eps").values():
        with pytest.raises(ValueError, match=r"in t: this model's times fall from 999;.*progress"):
            replace(term, interval=interval, interval_in="t").check(MODELS["eps"])


def test_times_and_open_sides_are_not_refused() -> None:
    for interval in ((0.0, 1.5), (200.0, 800.0), (0.5, None)):
        CFG(2.0, interval=interval, interval_in="t").check(MODELS["eps"])
    CFG(2.0, interval_in="sigma").check(MODELS["eps"])


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 2 * p),
        ("cosine", lambda p: 1 - math.cos(math.pi * p)),
        (lambda p: 1 - p * p, lambda p: 1 - p * p),
    ],
)
def test_a_schedule_weighs_the_contribution(
    schedule: object, formula: Callable[[float], float]
) -> None:
    """So a scale of w becomes 1 + weight (w - 1) for CFG, weight s for SAG."""
    denoiser = MODELS["eps"]
    for index in (1, 6):
        step = step_at(denoiser.process, index)
        weight = formula(index / 10)
        terms: list[Term] = [CFG(1 + 0.5 * weight), SAG(0.5 * weight)]
        scheduled: list[Term] = [CFG(1.5, schedule=schedule), SAG(0.5, schedule=schedule)]  # type: ignore[arg-type]
        torch.testing.assert_close(
            guided(denoiser, scheduled, step).v,
            guided(denoiser, terms, step).v,
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rising_schedules_have_mean_1_over_a_run(schedule: str) -> None:
    term = CFG(2.0, schedule=schedule)  # type: ignore[arg-type]
    grid = MODELS["eps"].process.grid(1000)
    steps = [Step(i, 1000, grid[i], grid[i + 1]) for i in range(1000)]
    weights = [term.weight(step) for step in steps]
    assert sum(weights) / 1000 == pytest.approx(1, abs=2e-3)
    assert weights[0] == 0 and weights == sorted(weights)
    assert not term.active(steps[0])


# --- identity -------------------------------------------------------------------------------------


def falling(progress: float, power: float = 1.0) -> float:
    return 1 - float(progress**power)


def test_options_added_later_do_not_rename_the_runs_made_before_them() -> None:
    """The identities of 0.1: new fields stand in it only where they are not at their default."""
    denoiser = MODELS["eps"]
    assert SAG(1.0).identity(denoiser) == {
        "term": "sag",
        "scale": 1.0,
        "interval": [0.0, 1.0],
        "branch": "auto",
        "blur_sigma": 1.0,
        "kernel_size": 9,
        "layer": "blocks.0.attn",
        "threshold": 1.0,
    }
    assert CFG(2.0).identity(denoiser).keys() == {"term", "scale", "interval", "channels"}
    assert SAG(1.0, mask="square").identity(denoiser)["mask"] == "square"


def test_every_option_is_part_of_the_identity() -> None:
    """And it survives JSON, so that a folder can be found again."""
    denoiser = MODELS["eps"]
    term = SAG(1.0)
    others: dict[str, object] = {
        "scale": 2.0,
        "interval": (0.1, 0.9),
        "interval_in": "t",
        "schedule": partial(falling, power=2.0),
        "branch": "null",
        "blur_sigma": 2.0,
        "kernel_size": None,
        "blur_in": "grid",
        "layer": (0, 1),
        "threshold": 1.3,
        "quantile": 0.5,
        "mask": "random",
        "heads": 1,
        "every": 2,
    }
    assert others.keys() == {each.name for each in fields(term)}
    seen = [json.dumps(replace(term, **{k: v}).identity(denoiser)) for k, v in others.items()]  # type: ignore[arg-type]
    assert len({json.dumps(term.identity(denoiser)), *seen}) == len(others) + 1
    for each in (*every("eps").values(), replace(term, schedule=partial(falling, power=2.0))):
        identity = each.identity(denoiser)
        assert json.loads(json.dumps(identity)) == identity
        assert " at 0x" not in str(identity)


def test_names_and_numbers_of_a_layer_are_one_layer() -> None:
    denoiser = MODELS["eps"]
    names = [PAG(1.0, layers=layer).identity(denoiser) for layer in ("auto", 0, ["blocks.0"])]
    assert names[0]["layers"] == ["blocks.0.attn"] and names[1:] == names[:-1]
    assert SEG(1.0).identity(denoiser)["blur_sigma"] == math.inf


# --- cost -----------------------------------------------------------------------------------------


PASSES = "passes of the network for each image instead of 8"


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ([], "8 passes of the network for each image"),
        ([CFG(2.0)], f"2 x unguided, 16 {PASSES}"),
        ([CFG(2.0), SAG(1.0)], f"3 x unguided, 24 {PASSES}"),
        ([CFG(2.0), BlurGuidance(1.0), PAG(1.0)], f"4 x unguided, 32 {PASSES}"),
        ([SAG(1.0, interval=(0.0, 0.25))], f"1.25 x unguided, 10 {PASSES}"),
    ],
)
def test_cost_is_told_in_one_line(terms: list[Term], told: str) -> None:
    cost = cost_of(MODELS["eps"], terms, DDIM(), 8)
    assert str(cost) == told
    assert cost.plain()["steps"] == 8
    assert cost.plain()["rows_per_step"] == sum(cost.rows) / 8


def test_cost_counts_each_evaluation_of_a_solver() -> None:
    """Heun's and some of diffusers' evaluate twice a step."""
    assert len(cost_of(MODELS["flow"], [], HeunFlow(), 5).rows) == 9
    assert len(cost_of(MODELS["eps"], [], DiffusersSampler("heun"), 6).rows) == 11


# --- a method of one's own ------------------------------------------------------------------------


@dataclass(frozen=True)
class Powered(Term):
    """A method whose fields are declared as a user would."""

    _: KW_ONLY
    power: int = 2

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        return self.scale * base.v**self.power


def test_a_method_of_one_s_own_needs_a_contribution_only() -> None:
    denoiser = MODELS["eps"]
    x, y = batch()
    step = step_at(denoiser.process, 4)
    base = denoiser(x, step.level, y).v
    asking = GuidedDenoiser(denoiser, [Powered(0.5, power=3, interval=(0.2, 0.6))])
    torch.testing.assert_close(asking(x, step, y).v, base + 0.5 * base**3)
    assert Powered(0.0).off
    assert Powered(0.5).identity(denoiser) == {
        "term": "tests.guidance.test_schedule.Powered",
        "scale": 0.5,
        "interval": [0.0, 1.0],
        "power": 2,
    }
