"""CFG++: x_0 is guided, and the noise that a step adds back is the null prediction's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import sag_dit
from sag_dit.guidance import (
    CFG,
    SAG,
    CFGpp,
    ClassifierGuidance,
    Contribution,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.term import Asking
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, NoiseLevel, Prediction, Process, Step
from sag_dit.process.base import OutputKind
from sag_dit.sampler import DDIM, Ancestral, EulerFlow, EulerMaruyama, Sampler, named
from sag_dit.sampler.usual import own_samplers, renoising, sampler_names
from tests.closeness import assert_near
from tests.guidance.every import MODELS, Classifier, batch, guided
from tests.guidance.reference import step_at
from tests.guidance.wavy import START, Wavy, wavy

LAMBDA = 0.6
NOISE = NoiseSource([0], [0])


def both(model: str, step: Step) -> tuple[Prediction, Prediction]:
    """The conditional and the null prediction."""
    denoiser, (x, y) = MODELS[model], batch()
    return denoiser(x, step.level, y), denoiser(x, step.level, denoiser.null(3))


def drawn(
    sampler: Sampler,
    *terms: Term,
    process: Process | None = None,
    kind: OutputKind = "eps",
    steps: int = 10,
    cond: float = 1.0,
) -> Tensor:
    """The end of a run of the formula."""
    process = process or DDPM("scaled_linear")
    denoiser = Wavy(process, kind, 1.0 if process.is_flow else 1000.0)
    guided = GuidedDenoiser(denoiser, terms, noise=NOISE)
    x = START

    def ask(x_t: Tensor, step: Step) -> Prediction:
        return guided(x_t, step, torch.full((1,), cond))

    for each in sampler.steps(ask, START, process, steps, NOISE):
        x = each.x
    return x


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("index", [0, 4, 9])
def test_x_0_is_guided_and_the_noise_is_null(model: str, index: int) -> None:
    """The equations of algorithm 2, in float64, for every kind of output."""
    step = step_at(MODELS[model].process, index)
    cond, null = both(model, step)
    level = step.level
    x = cond.x_t.double()
    x_0_cond, x_0_null = (
        level.d_sigma * x - level.sigma * each.v.double() for each in (cond, null)
    )
    eps_null = level.alpha * null.v.double() - level.d_alpha * x
    x_0 = x_0_null + LAMBDA * (x_0_cond - x_0_null)
    found = guided(MODELS[model], [CFGpp(LAMBDA)], step)
    assert_near(found.x_0.double(), x_0)
    clean = found.clamped(None)
    assert_near(clean.x_0.double(), x_0, scale=x_0_cond)
    assert_near(clean.eps.double(), eps_null)
    assert_near(clean.x_t.double(), level.alpha * x_0 + level.sigma * eps_null)


# From CFGpp-diffusion/CFGpp, latent_diffusion.py at 8035352, in float32: its solvers ddim_cfg++,
# euler_cfg++ and euler_a_cfg++ with lambda = 0.6 and 10 steps, on the formula in wavy.py in place
# of the UNet. The Euler ones were given the levels of our grid and our noise.
GOLDEN = {
    "ddim_strided": [
        *(-5.652334213, -1.409121037, -1.390419126, -1.104698300),
        *(-4.200250626, 0.556173682, 2.074413061, 6.166257858),
    ],
    "euler_karras": [
        *(-11.153225899, -3.564605951, -2.645290852, -1.711959600),
        *(-6.829775333, 1.474495530, 4.809645653, 11.932600021),
    ],
    "euler_ancestral": [
        *(-10.199095726, 0.101851597, -1.943947196, 0.163694553),
        *(-12.270051002, 1.675865889, -1.195954204, 5.765307427),
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_whole_runs_are_the_authors(name: str) -> None:
    found = drawn(named(name, DDPM()), CFGpp(LAMBDA))
    assert_near(found.flatten(), torch.tensor(GOLDEN[name]), 1e-5)


def algorithm_2(process: Process, kind: str, steps: int) -> Tensor:
    """Algorithm 2 of the paper in float64; for flows the authors' lines in their issue 12."""
    x, grid = START.double(), process.grid(steps)
    for now, after in pairwise(grid):
        time = float(now.t) / (1.0 if process.is_flow else 1000.0)
        cond, null = wavy(x, time, 1.0), wavy(x, time, 0.0)
        mixed = null + LAMBDA * (cond - null)
        if kind == "v":
            z_0, z_1 = x - now.sigma * mixed, x + (1 - now.sigma) * null
            x = (1 - after.sigma) * z_0 + after.sigma * z_1
        else:
            x_0 = (x - now.sigma * mixed) / now.alpha
            x = after.alpha * x_0 + after.sigma * null
    return x


def test_a_run_of_ddim_is_algorithm_2() -> None:
    process = DDPM()
    found = drawn(DDIM(), CFGpp(LAMBDA), process=process, steps=12)
    assert_near(found.double(), algorithm_2(process, "eps", 12), 1e-5)


def test_a_run_of_a_flow_is_the_authors_later_form() -> None:
    process = Flow()
    found = drawn(EulerFlow(), CFGpp(LAMBDA), process=process, kind="v", steps=12)
    assert_near(found.double(), algorithm_2(process, "v", 12), 1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "euler_flow"])
def test_of_an_image_of_nothing_it_is_the_plain_sampler(name: str) -> None:
    """Where the condition is the null condition, there is one noise, and no difference."""
    process, kind = (Flow(), "v") if name == "euler_flow" else (DDPM("scaled_linear"), "eps")
    found, plain = (
        drawn(named(name, process), *terms, process=process, kind=kind, cond=0.0)  # type: ignore[arg-type]
        for terms in ((CFGpp(LAMBDA),), ())
    )
    assert_near(found, plain, 1e-4)


def test_ancestral_sampling_is_ddim_of_eta_1() -> None:
    """Both take the noise that stays from the null prediction, and draw as much besides."""
    found = drawn(Ancestral("fixed_small"), CFGpp(LAMBDA))
    assert_near(found, drawn(DDIM(eta=1.0), CFGpp(LAMBDA)), 1e-4)
    assert (found - drawn(Ancestral("fixed_small"), CFG(LAMBDA))).abs().max() > 0.1


def test_a_step_of_the_sde_starts_where_x_0_and_the_null_noise_lead() -> None:
    process, sampler = Flow(), EulerMaruyama(norm=0.7)
    grid = sampler.grid(process, 5)
    x = START.double()
    for i, (now, after) in enumerate(pairwise(grid)):
        u, h = float(now.sigma), float(now.sigma) - float(after.sigma)
        cond, null = wavy(x, u, 1.0), wavy(x, u, 0.0)
        x_0, eps = x - u * (null + LAMBDA * (cond - null)), x + (1 - u) * null
        w = 0.7 * u
        x = (1 - u + h) * x_0 + (u - h) * eps - h * w * eps / u
        if i < 4:
            x = x + math.sqrt(2 * w * h) * NOISE.like(x, i)
    found = drawn(sampler, CFGpp(LAMBDA), process=process, kind="v", steps=5)
    assert_near(found.double(), x, 1e-5)


def test_both_predictions_are_clamped() -> None:
    step = step_at(DDPM(), 4)
    _, null = both("eps", step)
    found = guided(MODELS["eps"], [CFGpp(LAMBDA)], step)
    limits = (-0.5, 0.5)
    clean = found.clamped(limits)
    assert_near(clean.x_0, found.x_0.clamp(*limits), 1e-4)
    assert_near(clean.eps, null.clamped(limits).eps, 1e-4)
    assert (found.x_0.abs() > 0.5).any() and (null.x_0.abs() > 0.5).any()


def test_what_is_not_clamped_stays_so() -> None:
    step = step_at(DDPM(), 4)
    mean = ClassifierGuidance(7.0, classifier=Classifier(), form="mean")
    with_mean = guided(MODELS["eps"], [CFGpp(LAMBDA), mean], step).clamped((-0.5, 0.5))
    plain = guided(MODELS["eps"], [CFGpp(LAMBDA)], step).clamped((-0.5, 0.5))
    shift = guided(MODELS["eps"], [mean], step).unclamped
    assert shift is not None and shift.abs().max() > 0
    assert_near(with_mean.x_0 - plain.x_0, -step.level.sigma * shift, 1e-4, scale=plain.x_0)
    assert_near(with_mean.eps - plain.eps, step.level.alpha * shift, 1e-4, scale=plain.eps)


@pytest.mark.parametrize("other", [SAG(0.7), CFG(1.7)])
def test_other_methods_move_x_0_and_noise_alike(other: Term) -> None:
    """Beside CFG++ a scale means what it means without it."""
    step = step_at(DDPM(), 4)
    alone = guided(MODELS["eps"], [CFGpp(LAMBDA)], step)
    together = guided(MODELS["eps"], [CFGpp(LAMBDA), other], step)
    # SAG degrades the null prediction beside CFG++, as it does beside CFG.
    beside = guided(MODELS["eps"], [CFG(1.0 + 1e-6), other], step)
    cond, null = both("eps", step)
    added = beside.v - cond.v
    assert added.abs().max() > 0.01
    assert_near(together.v - alone.v, added, 1e-4, scale=alone.v)
    clean, plain = together.clamped(None), alone.clamped(None)
    assert_near(plain.eps, null.eps)
    assert_near(clean.eps - plain.eps, step.level.alpha * added, 1e-4, scale=plain.eps)
    assert_near(clean.x_0 - plain.x_0, -step.level.sigma * added, 1e-4, scale=plain.x_0)


def test_a_step_that_lands_there_by_one_prediction() -> None:
    """For schedulers that take one v: DDIM's step, and Euler's of a flow."""
    for model, index in (("eps", 3), ("flow", 0), ("flow", 5), ("flow", 9)):
        step = step_at(MODELS[model].process, index)
        found = guided(MODELS[model], [CFGpp(LAMBDA)], step)
        one, two, after = found.in_one(step.next), found.clamped(None), step.next
        assert one.x_0_only is None and one.x_t is found.x_t
        expected = after.alpha * two.x_0 + after.sigma * two.eps
        assert_near(after.alpha * one.x_0 + after.sigma * one.eps, expected, 1e-4, scale=one.eps)
        assert one.in_one(step.next) is one


def test_between_its_steps_both_parts_are_held() -> None:
    term = CFGpp(LAMBDA, every=2)
    denoiser, (x, y) = MODELS["eps"], batch()
    asking = GuidedDenoiser(denoiser, [term])
    first = asking(x, step_at(denoiser.process, 0), y)
    second = asking(x, step_at(denoiser.process, 1), y)
    assert first.x_0_only is not None and second.x_0_only is not None
    assert torch.equal(first.x_0_only, second.x_0_only)
    assert cost_of(denoiser, [term], DDIM(), 10).passes == 15


def test_outside_of_its_interval_it_leaves_every_bit() -> None:
    late = CFGpp(LAMBDA, interval=(0.5, 1.0))
    for index in (0, 7):
        step = step_at(DDPM(), index)
        found, plain = guided(MODELS["eps"], [late], step), guided(MODELS["eps"], [], step)
        assert (found.x_0_only is None) == torch.equal(found.v, plain.v) == (index == 0)


def test_rows_are_cut_from_both_parts() -> None:
    found = guided(MODELS["eps"], [CFGpp(LAMBDA)], step_at(DDPM(), 4))
    part = found.rows(1, 2)
    assert found.x_0_only is not None and part.x_0_only is not None
    assert torch.equal(part.x_0_only, found.x_0_only[1:2])


@pytest.mark.parametrize("scale", [-0.1, 1.5, 7.5])
def test_a_scale_of_cfg_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"cfgpp_scale={scale}.*from 0 \(off\) to 1"):
        CFGpp(scale)


def test_samplers_that_mix_predictions_are_refused_by_name() -> None:
    right = {"ddim", "ddim_strided", "ddpm", "euler_flow", "sde_flow"}
    right |= {"euler", "euler_karras", "euler_ancestral"}
    # Other tests may have brought samplers of their own.
    ours = {name for name, kind in own_samplers().items() if kind.__module__.startswith("sag_dit.")}
    known = {*sampler_names()} - {"auto", *own_samplers()} | ours
    assert known & {*renoising()} == right
    for name in sorted(known):
        sampler = named(name, DDPM())
        if name in right:
            CFGpp(LAMBDA).check_sampler(sampler)
            continue
        with pytest.raises(ValueError, match=rf"cfgpp_scale=0.6: sampler={name} .*use one of ddim"):
            CFGpp(LAMBDA).check_sampler(sampler)
        CFG(2.0).check_sampler(sampler)


def test_a_sampler_of_ones_own_says_that_it_can() -> None:
    @dataclass(frozen=True)
    class Mine(DDIM):
        renoises = False

    with pytest.raises(ValueError, match=r"cfgpp_scale=0\.6"):
        sag_dit.sample(
            sag_dit.load("digits"), [1], guidance=[CFGpp(LAMBDA)], sampler=Mine(), steps=2
        )


def test_a_term_that_does_not_say_so_is_told() -> None:
    @dataclass(frozen=True)
    class Silent(Term):
        def contribution(self, ask: Question) -> Asking:
            (base,) = yield (ask.base,)
            return Contribution(base.v, x_0_only=base.v)

    @dataclass(frozen=True)
    class Small(Silent):
        renoises = True

        def contribution(self, ask: Question) -> Asking:
            (base,) = yield (ask.base,)
            return Contribution(base.v, x_0_only=base.v[:1])

    step = step_at(DDPM(), 4)
    with pytest.raises(ValueError, match=r"Silent returned a part .* write renoises = True"):
        guided(MODELS["eps"], [Silent(1.0)], step)
    with pytest.raises(ValueError, match=r"Small returned \(1, 4, 8, 8\)"):
        guided(MODELS["eps"], [Small(1.0)], step)


def test_the_pure_noise_of_a_flow_stays() -> None:
    """There alpha is 0, and the noise that is added back is x itself."""
    step = step_at(Flow(), 0)
    clean = guided(MODELS["flow"], [CFGpp(LAMBDA)], step).clamped(None)
    assert_near(clean.eps, batch()[0])


def level_of(t: float, alpha: float) -> NoiseLevel:
    sigma = math.sqrt(1 - alpha**2)
    return NoiseLevel(t=t, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)


def test_a_branch_at_another_level_is_a_batch_of_its_own() -> None:
    """It is told that level's time, and its answer stands at that level."""
    told: list[tuple[int, list[float]]] = []

    class Telling(Wavy):
        def evaluate(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            told.append((len(x_t), t.tolist()))
            return super().evaluate(x_t, t, cond)

    @dataclass(frozen=True)
    class Elsewhere(Term):
        def contribution(self, ask: Question) -> Asking:
            x, level = ask.base.x_t, level_of(7.0, 0.8)
            here, there, again, null = yield (
                ask.base,
                ask.base.at(x, level),
                ask.base.at(x, level_of(7.0, 0.8)),
                ask.required_null().at(x, level),
            )
            assert (here.level, there.level, null.level) == (ask.step.level, level, level)
            assert again is there
            return there.v - here.v

    denoiser, step = Telling(DDPM(), "eps", 1000.0), step_at(DDPM(), 4)
    found: Any = GuidedDenoiser(denoiser, [Elsewhere(1.0)])(START, step, torch.ones(1))
    assert told == [(1, [step.level.t]), (2, [7.0, 7.0])]
    there = denoiser(START, level_of(7.0, 0.8), torch.ones(1))
    assert_near(found.v, there.v)
    assert cost_of(denoiser, [Elsewhere(1.0)], DDIM(), 4).passes == 12
