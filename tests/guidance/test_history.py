"""Guidance by earlier steps: momentum guidance, HiGS, SG-prev; and self-guidance at a noisier time.

Goldens in history_goldens.safetensors, of inputs of tests/parity/fixed.py:

- ``mg``: mg_nodes.py of pamparamm/sd-perturbed-attention at 904319b. It extrapolates what it is
  given, which is x_0 there; here it was given the paper's v.
- ``higs/ETA``: algorithms 2 and 3 of the paper, with scipy's DCT in place of torch_dct's.
- ``sg``, ``sg_prev``: the Stable Diffusion pipeline of maple-research-lab/Self-Guidance at 843bda7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.guidance import (
    CFG,
    SAG,
    CFGZero,
    GuidedDenoiser,
    HiGS,
    MomentumGuidance,
    Question,
    SelfGuidance,
    SelfGuidancePrevious,
    Term,
    cost_of,
)
from sag_dit.guidance.higs import high_frequencies
from sag_dit.guidance.term import Asking
from sag_dit.noise import NoiseSource
from sag_dit.pipelines import guide
from sag_dit.process import DDPM, Flow, Prediction, Process, Step
from sag_dit.process.base import OutputKind
from sag_dit.sampler import DDIM, EulerFlow, HeunFlow, Sampler
from tests.closeness import assert_near
from tests.guidance.every import MODELS, batch
from tests.guidance.reference import counted, step_at
from tests.parity.fixed import fixed
from tests.pipelines import tiny

GOLDENS = load_file(Path(__file__).with_name("history_goldens.safetensors"))
LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
EVERY: list[Term] = [
    MomentumGuidance(0.7),
    HiGS(1.5, t_min=0.0),
    SelfGuidancePrevious(0.8),
]


def names(term: Term) -> str:
    return term.key


class Says(Denoiser):
    """A denoiser that says what it is told to, of images of any size."""

    def __init__(self, kind: OutputKind, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.network, self.process, self.kind = nn.Linear(1, 1), Flow(), kind
        self.latent_shape, self.x_0_range, self.layers = size, None, {}
        self.says = torch.zeros(1)

    def evaluate(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.says

    def null(self, count: int) -> None:
        return None

    def join(self, conditions: Sequence[Any]) -> Any:
        return conditions[0]


def told(term: Term, kind: OutputKind) -> Tensor:
    """What becomes of five predictions of one kind, in that kind."""
    model = Says(kind, (3, 6, 5))
    asking, flow, found = GuidedDenoiser(model, [term]), Flow(), []
    for index in range(5):
        model.says = fixed(f"history/{index}", 2, 3, 6, 5)
        step = Step(index, 5, flow.level(LEVELS[index]), flow.level(LEVELS[index + 1]))
        found.append(getattr(asking(fixed("history x", 2, 3, 6, 5), step, 0), kind))
    return torch.stack(found)


def test_momentum_is_the_published_node_s() -> None:
    assert_near(told(MomentumGuidance(0.7, decay=0.6), "v"), GOLDENS["mg"], 1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_higs_is_the_paper_s_algorithm(eta: float) -> None:
    term = HiGS(1.75, eta=eta, t_min=0.3, t_max=0.9, cutoff=0.1)
    found = told(term, "x_0")
    assert_near(found, GOLDENS[f"higs/{eta:g}"], 1e-5)
    assert (found[1] - fixed("history/1", 2, 3, 6, 5)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("term", "golden"),
    [
        (SelfGuidance(2.0, shift=0.01), "sg"),
        (SelfGuidancePrevious(2.0, interval=(None, 699.0), interval_in="t"), "sg_prev"),
    ],
    ids=["sg", "sg_prev"],
)
def test_self_guidance_is_the_authors_pipeline(term: Term, golden: str) -> None:
    """Beside the pipeline's own guidance."""
    pipe = tiny.sd()
    weights = {
        name: fixed(f"sg/{name}", *value.shape, std=0.3)
        for name, value in pipe.unet.state_dict().items()
    }
    pipe.unet.load_state_dict(weights)
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, term):
        latents = pipe(
            prompt_embeds=fixed("sg prompt", 1, tiny.TOKENS, 16),
            negative_prompt_embeds=fixed("sg negative", 1, tiny.TOKENS, 16),
            latents=fixed("sg latents", 1, 4, 8, 8),
            num_inference_steps=5,
            guidance_scale=3.0,
            output_type="latent",
            height=16,
            width=16,
        ).images
    assert_near(latents, GOLDENS[golden], 1e-5)


# --- the equations, of a network's own predictions, in float64 ------------------------------------


def images(index: int) -> Tensor:
    """Images of a run, another at each step."""
    return batch()[0] + 0.3 * fixed(f"history run/{index}", 3, 4, 8, 8)


def run(model: str, terms: Sequence[Term], indices: Sequence[int]) -> list[Prediction]:
    asking = GuidedDenoiser(MODELS[model], terms, noise=NoiseSource([0, 0, 0], [0, 1, 2]))
    process, y = MODELS[model].process, batch()[1]
    return [asking(images(index), step_at(process, index), y) for index in indices]


def cosine_filter(x: Tensor, cutoff: float) -> Tensor:
    """The high-pass filter of HiGS, cosine by cosine."""
    h, w = x.shape[2:]
    out = torch.zeros_like(x)
    for a in range(h):
        for b in range(w):
            down = torch.cos(math.pi * a * (2 * torch.arange(h).double() + 1) / (2 * h))
            across = torch.cos(math.pi * b * (2 * torch.arange(w).double() + 1) / (2 * w))
            wave = down[:, None] * across
            share = (x * wave).sum(dim=(2, 3), keepdim=True) / (wave * wave).sum()
            radius = math.sqrt((a / h) ** 2 + (b / w) ** 2)
            out += share * wave / (1 + math.exp(-50 * (radius - cutoff)))
    return out


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 4)])
def test_the_filter_is_that_of_cosines(size: tuple[int, int]) -> None:
    x = fixed("filtered", 2, 3, *size)
    assert_near(high_frequencies(x, 0.2), cosine_filter(x.double(), 0.2).float())


def momentum(before: list[Prediction], now: Prediction, flow: bool) -> Tensor:
    past, here = ([p.v if flow else p.eps for p in each] for each in (before, [now]))
    mean = past[0].double()
    for each in past:
        mean = 0.4 * each.double() + 0.6 * mean
    change = 0.7 * (here[0].double() - mean)
    return change if flow else change / now.level.alpha


def previous(before: list[Prediction], now: Prediction, flow: bool) -> Tensor:
    if flow:
        return 0.8 * (now.v.double() - before[-1].v.double())
    return 0.8 * (now.eps.double() - before[-1].eps.double()) / now.level.alpha


def higs(before: list[Prediction], now: Prediction, flow: bool) -> Tensor:
    x_0, t = now.x_0.double(), float(now.level.sigma if flow else now.level.t / 1000)
    powers = range(len(before) - 1, -1, -1)
    mean = sum(0.75 * 0.25**power * p.x_0.double() for power, p in zip(powers, before, strict=True))
    change = x_0 - torch.as_tensor(mean)
    along = (change * x_0).sum(dim=(1, 2, 3)) / (x_0 * x_0).sum(dim=(1, 2, 3))
    change = change - 0.7 * along[:, None, None, None] * x_0
    return -1.5 * math.sqrt((t - 0.2) / 0.8) * cosine_filter(change, 0.05) / now.level.sigma


@pytest.mark.parametrize("model", ["eps", "v", "x_0", "flow"])
@pytest.mark.parametrize(
    ("term", "equation", "others"),
    [
        (MomentumGuidance(0.7), momentum, []),
        (MomentumGuidance(0.7), momentum, [CFG(2.0), SAG(0.5)]),
        (HiGS(1.5, t_min=0.2, eta=0.3), higs, []),
        (HiGS(1.5, t_min=0.2, eta=0.3), higs, [CFG(2.0)]),
        (SelfGuidancePrevious(0.8), previous, []),
    ],
)
def test_each_is_its_equation_of_the_guided_steps_before(
    model: str, term: Term, equation: Callable[..., Tensor], others: list[Term]
) -> None:
    """Of what CFG and SAG have guided."""
    flow = MODELS[model].process.is_flow
    without = run(model, others, range(6))
    found = run(model, [*others, term], range(6))
    assert torch.equal(found[0].v, without[0].v)
    for index in range(1, 6):
        expected = without[index].v + equation(without[:index], without[index], flow).float()
        assert_near(found[index].v, expected)
        assert (found[index].v - without[index].v).abs().max() > 1e-2


def test_self_guidance_compares_with_a_noisier_time_told() -> None:
    """Of the prompt's prediction beside CFG too."""
    x, y = batch()
    for name, alpha in (("eps", True), ("flow", False)):
        model = MODELS[name]
        step = step_at(model.process, 4)
        t = float(step.level.t) + (20 if alpha else 0.02)
        noisier = model.network(x, torch.full((3,), t), y)
        own = model.network(x, torch.full((3,), float(step.level.t)), y)
        change = 1.5 * (own - noisier).double() / (step.level.alpha if alpha else 1)
        for others in ([], [CFG(2.0)]):
            before = GuidedDenoiser(model, others)(x, step, y).v
            with counted(model) as rows:
                found = GuidedDenoiser(model, [*others, SelfGuidance(1.5, shift=0.02)])(x, step, y)
            assert sum(rows) == 3 * (2 + len(others))
            assert_near(found.v, before + change.float())
            assert found.level == step.level


# --- what history is ------------------------------------------------------------------------------


@pytest.mark.parametrize("term", EVERY, ids=names)
def test_steps_outside_of_the_interval_count_but_are_not_guided(term: Term) -> None:
    plain, whole = run("flow", [], range(8)), run("flow", [term], range(8))
    limited = run("flow", [replace(term, interval=(0.3, 0.6))], range(8))
    for index in range(8):
        expected = whole if index in (3, 4, 5) else plain
        assert torch.equal(limited[index].v, expected[index].v)


@pytest.mark.parametrize("term", EVERY, ids=names)
def test_steps_where_the_contribution_is_held_count_too(term: Term) -> None:
    plain, whole = run("flow", [], range(6)), run("flow", [term], range(6))
    held = run("flow", [replace(term, every=2)], range(6))
    for index in range(6):
        asked = index - index % 2
        contribution = whole[asked].v - plain[asked].v
        assert_near(held[index].v, plain[index].v + contribution, scale=whole[index].v)


@pytest.mark.parametrize("term", EVERY, ids=names)
def test_history_counts_a_solver_s_steps_not_its_evaluations(term: Term) -> None:
    """The second evaluation of a step is guided by the first, and no one is guided by it."""
    process, y = MODELS["flow"].process, batch()[1]
    grid = process.grid(4)

    def asked(steps: Sequence[Step]) -> list[Tensor]:
        asking = GuidedDenoiser(MODELS["flow"], [term])
        return [asking(images(step.index), step, y).v for step in steps]

    heun = [
        Step(2 * i + j, 7, grid[i + j], grid[i + 1], evaluations=2)
        for i in range(3)
        for j in range(2)
    ]
    both = asked(heun)
    # The first ones are those of a run without the second ones.
    for found, expected in zip(both[::2], asked(heun[::2]), strict=True):
        assert torch.equal(found, expected)
    # A second one is what the next step would be at its place.
    for last in (1, 3, 5):
        steps = [*heun[:last:2], replace(heun[last], index=heun[last].index + 1)]
        asking = GuidedDenoiser(MODELS["flow"], [term])
        for step in steps[:-1]:
            asking(images(step.index), step, y)
        assert torch.equal(both[last], asking(images(last), steps[-1], y).v)


@pytest.mark.parametrize("term", EVERY, ids=names)
@pytest.mark.parametrize(
    ("model", "sampler"),
    [("flow", EulerFlow()), ("flow", HeunFlow()), ("eps", DDIM()), ("eps, cosine", DDIM(eta=1.0))],
)
def test_it_costs_no_pass_and_an_image_is_its_own(term: Term, model: str, sampler: Sampler) -> None:
    """In a run: it changes the image, which does not depend on the others of its batch."""
    denoiser, terms = MODELS[model], [CFG(1.5), term]
    without = cost_of(denoiser, [CFG(1.5)], sampler, 6)
    assert cost_of(denoiser, terms, sampler, 6) == without

    def drawn(images: Sequence[int], guidance: Sequence[Term]) -> Tensor:
        noise = NoiseSource([0] * len(images), images)
        asking = GuidedDenoiser(denoiser, guidance, noise=noise)
        x, y = noise.normal(0, denoiser.latent_shape), torch.tensor([3 + i for i in images])
        for each in sampler.steps(
            lambda x_t, step: asking(x_t, step, y), x, denoiser.process, 6, noise
        ):
            x = each.x
        return x

    with torch.no_grad(), counted(denoiser) as rows:
        together = drawn([0, 1, 2], terms)
        assert [each // 3 for each in rows] == list(without.rows)
        assert_near(drawn([1], terms), together[1:2], 1e-4)
        assert (drawn([1], [CFG(1.5)]) - together[1:2]).abs().max() > 1e-2


# --- terms that act on the guided prediction ------------------------------------------------------


@dataclass(frozen=True)
class Doubled(Term):
    """Adds the guided prediction once more, and a question of its own."""

    on_guided = True

    def contribution(self, ask: Question) -> Asking:
        base, other = yield ask.base, ask.base.at(-ask.base.x_t)
        return self.scale * (ask.guided.v + other.v - 0 * base.v)


def test_each_is_given_the_sum_of_all_others_whatever_the_order() -> None:
    model, (x, y) = MODELS["flow"], batch()
    step = step_at(model.process, 4)
    guided = GuidedDenoiser(model, [CFG(2.0), SAG(0.5)])(x, step, y).v
    other = model(-x, step.level, y).v
    expected = guided + 2 * (guided + other) + 0.5 * 2 * (guided + other)
    doubled, half = Doubled(2.0), Doubled(2.0, schedule=lambda p: 0.5)
    for terms in (
        [CFG(2.0), SAG(0.5), doubled, half],
        [half, doubled, SAG(0.5), CFG(2.0)],
        [doubled, CFG(2.0), half, SAG(0.5)],
    ):
        with counted(model) as rows:
            assert_near(GuidedDenoiser(model, terms)(x, step, y).v, expected)
        assert rows == [6, 3, 6]


def test_where_the_velocity_is_zeroed_that_is_what_is_remembered() -> None:
    terms = [CFGZero(2.0, zero_steps=2), MomentumGuidance(0.5)]
    found = run("flow", terms, range(3))
    assert found[0].v.abs().max() == 0 and found[1].v.abs().max() == 0
    alone = run("flow", [CFGZero(2.0, zero_steps=2)], range(3))[2].v
    assert_near(found[2].v, 1.5 * alone)


def test_who_asks_for_the_guided_prediction_says_so_in_the_class() -> None:
    @dataclass(frozen=True)
    class Forgot(Term):
        def contribution(self, ask: Question) -> Asking:
            yield (ask.base,)
            return ask.guided.v

    x, y = batch()
    with pytest.raises(ValueError, match="state on_guided = True"):
        GuidedDenoiser(MODELS["flow"], [Forgot()])(x, step_at(Flow(), 4), y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MomentumGuidance(0.5, decay=1.0), "decay=1.0: expected 0 or more"),
        (lambda: HiGS(1.0, share=0.0), "share=0.0: expected a number between 0 and 1"),
        (lambda: HiGS(1.0, t_min=0.5, t_max=0.5), "t_min=0.5, t_max=0.5: expected 0 <= t_min"),
        (lambda: SelfGuidance(1.0, shift=0.0), "shift=0.0: expected a number between"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Term], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_of_scores_is_refused() -> None:
    process: Process = DDPM()
    scores = ClassConditional(MODELS["eps"].network, process, kind="score")
    with pytest.raises(ValueError, match=r"sg_scale=1\.0: this network puts out scores"):
        GuidedDenoiser(scores, [SelfGuidance(1.0)])
