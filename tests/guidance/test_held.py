"""Terms that ask at every so many steps, and hold their contribution between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.guidance import (
    CFG,
    SAG,
    BlurGuidance,
    CFGZero,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.term import Asking
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.sampler import DDIM, HeunFlow, Sampler
from sag_dit.sampler.diffusers import DiffusersSampler
from sag_dit.traces import Recorder
from tests.closeness import assert_near
from tests.guidance.every import MODELS, edits_base, every
from tests.guidance.reference import counted, step_at

STEPS = 10


@dataclass(frozen=True)
class Index(Term):
    """Contributes the number of the evaluation at which it was asked, from 1."""

    def contribution(self, ask: Question) -> Asking:
        yield (ask.base,)
        return torch.full_like(ask.base.x_t, ask.step.index + 1)


def contributions(term: Term, sampler: Sampler, model: str, steps: int = STEPS) -> list[float]:
    """What the term added to v at each evaluation of a run."""
    denoiser, seen = MODELS[model], []
    guided, plain = GuidedDenoiser(denoiser, [term]), GuidedDenoiser(denoiser)
    labels, noise = torch.tensor([3]), NoiseSource([0], [0])

    def ask(x: Tensor, step: Step) -> Prediction:
        before = plain(x, step, labels)
        seen.append(round(float((guided(x, step, labels).v - before.v).mean()), 3))
        return before

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in sampler.steps(ask, x, denoiser.process, steps, noise):
            pass
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"every": 2}, [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]),
        ({"every": 3}, [1, 1, 1, 4, 4, 4, 7, 7, 7, 10]),
        ({"every": 99}, [1] * 10),
        # The first active step asks, whatever its number, and then those on the common beat.
        ({"every": 2, "interval": (0.4, 0.8)}, [0, 0, 0, 0, 5, 5, 7, 7, 0, 0]),
        ({"every": 2, "interval": (0.3, 0.8)}, [0, 0, 0, 4, 5, 5, 7, 7, 0, 0]),
        ({"every": 3, "interval": (0.1, 1.0)}, [0, 2, 2, 4, 4, 4, 7, 7, 7, 10]),
        ({"every": 4, "interval": (0.5, 0.8)}, [0, 0, 0, 0, 0, 6, 6, 6, 0, 0]),
        # The weight is that of the step at hand, not of the one that asked.
        (
            {"every": 5, "schedule": "linear"},
            [0, 2 * 0.2, 2 * 0.4, 2 * 0.6, 2 * 0.8, 6, 6 * 1.2, 6 * 1.4, 6 * 1.6, 6 * 1.8],
        ),
    ],
)
def test_between_its_steps_a_term_holds_what_it_contributed(
    options: dict[str, Any], expected: list[float]
) -> None:
    assert contributions(Index(**options), DDIM(), "eps") == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("sampler", "model"), [(HeunFlow(), "flow"), (DiffusersSampler("heun"), "eps")]
)
def test_both_evaluations_of_a_step_ask_or_hold(sampler: Sampler, model: str) -> None:
    seen = contributions(Index(every=2), sampler, model, steps=6)
    assert seen == [1, 2, 2, 2, 5, 6, 6, 6, 9, 10, 10]


@pytest.mark.parametrize("name", [n for n, t in every("flow").items() if not edits_base(t)])
def test_every_method_asks_again_as_if_for_the_first_time(name: str) -> None:
    """Where nothing is held, a step is what it is without the lever."""
    denoiser = MODELS["flow"]
    term = every("flow")[name]
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, noise = torch.tensor([1, 2, 3]), NoiseSource([0, 0, 7], [4, 5, 6])
    held = GuidedDenoiser(denoiser, [replace(term, every=2)], noise=noise)
    first, second, third = (step_at(denoiser.process, index, 30) for index in (20, 21, 22))
    with counted(denoiser) as calls:
        added = held(x, first, labels).v - GuidedDenoiser(denoiser)(x, first, labels).v
        calls.clear()
        again = held(x, second, labels).v - GuidedDenoiser(denoiser)(x, second, labels).v
        assert calls == [3, 3]  # The plain pass of each.
    assert_near(again, added)
    plain = GuidedDenoiser(denoiser, [term], noise=noise)
    # Some remember more than their contribution.
    memory = held._memory[0].values()
    if not term.remembers and not any(isinstance(each, Tensor) for each in memory):
        assert torch.equal(held(x, third, labels).v, plain(x, third, labels).v)


def test_held_cfg_still_counts_as_cfg_for_others() -> None:
    denoiser = MODELS["eps"]
    x, labels = torch.randn(1, 4, 8, 8), torch.tensor([3])
    step, later = step_at(denoiser.process, 4), step_at(denoiser.process, 5)
    guided = GuidedDenoiser(denoiser, [CFG(2.0, every=2), BlurGuidance(0.5)])
    guided(x, step, labels)
    cfg = guided._held[0].contribution.v
    expected = GuidedDenoiser(denoiser, [BlurGuidance(0.5, branch="null")])(x, later, labels).v
    assert_near(guided(x, later, labels).v, expected + cfg)


def test_the_cost_counts_what_is_asked() -> None:
    denoiser = MODELS["eps"]
    alone = cost_of(denoiser, [CFG(2.0)], DDIM(), 40)
    terms = [CFG(2.0), SAG(0.5, interval=(0.5, 1.0), every=2)]
    cost = cost_of(denoiser, terms, DDIM(), 40)
    assert sum(alone.rows) == 80
    assert sum(cost.rows) == 80 + 10
    assert cost.rounds[20:24] == (2, 1, 2, 1)


@pytest.mark.parametrize("steps", [20, 21, 25, 30, 50, 250])
def test_terms_that_start_at_different_steps_ask_together(steps: int) -> None:
    """Held beside each other they cost less than CFG alone, whatever the number of steps."""
    terms = [CFG(1.5, every=2), SAG(3.0, interval=(0.5, 1.0), every=2)]
    cost = cost_of(MODELS["eps"], terms, DDIM(), steps)
    # Where SAG starts between two, it asks there once more, with the null row that it degrades.
    assert 1.75 * steps - 1 <= cost.passes <= 1.75 * steps + 2.25
    assert cost.rows[-2:] in ((3, 1), (1, 3))


def test_a_term_that_was_away_for_long_asks_when_it_is_back() -> None:
    """Though its step is not on the beat."""

    def there(progress: float) -> float:
        return float(progress < 0.25 or progress >= 0.65)

    seen = contributions(Index(every=3, schedule=there), DDIM(), "eps")
    assert seen == pytest.approx([1, 1, 1, 0, 0, 0, 0, 8, 8, 10], abs=0.01)


def test_a_trace_shows_what_guidance_used_where_it_was_held() -> None:
    denoiser, sag = MODELS["eps"], SAG(0.5, every=3)
    recorder = Recorder(denoiser, [sag])
    guided, noise = GuidedDenoiser(denoiser, [sag]), NoiseSource([0], [0])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in DDIM().steps(
            lambda x, at: guided(x, at, torch.tensor([3])), x, denoiser.process, STEPS, noise
        ):
            recorder(step)
    steps = {step.index: step for step in recorder.trace(0).steps}
    assert list(steps) == [0, 2, 4, 5, 7, 9]
    assert (steps[0].saliency == steps[2].saliency).all()
    assert (steps[2].saliency != steps[4].saliency).any()


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_other_numbers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="every="):
        SAG(0.5, every=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero_steps=1 beside every=2"):
        CFGZero(2.0, every=2)
