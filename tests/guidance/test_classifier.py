"""Classifier guidance in its two published forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG, ClassifierGuidance, GuidedDenoiser
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow
from sag_dit.process.ddpm import Posterior
from sag_dit.sampler import Ancestral
from tests.closeness import assert_near
from tests.guidance.every import MODELS, Classifier, batch, guided, small_dit
from tests.guidance.reference import counted, step_at
from tests.properties.ideal import Ideal


def gradient(x: Tensor, t: float, y: Tensor) -> Tensor:
    """The gradient of log p(y | x_t), image by image, by finite differences' exact cousin."""
    x = x.clone().requires_grad_()
    logits = Classifier().to(x)(x, torch.full((len(x),), t))
    log_p = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    return -torch.autograd.grad(log_p, x)[0]


@pytest.mark.parametrize("model", ["eps", "v", "flow"])
@pytest.mark.parametrize("index", [1, 9])
def test_score_form_shifts_eps_against_the_gradient(model: str, index: int) -> None:
    denoiser = MODELS[model]
    step = step_at(denoiser.process, index)
    x, y = batch()
    eps = guided(denoiser, [], step).eps
    expected = eps - 5.0 * step.level.sigma * gradient(x, float(step.level.t), y)
    assert (expected - eps).abs().max() > 1e-3
    term = ClassifierGuidance(5.0, classifier=Classifier())
    assert_near(guided(denoiser, [term], step).eps, expected)


@pytest.mark.parametrize("learned", [True, False])
def test_mean_form_shifts_the_ancestral_mean_by_variance_times_gradient(learned: bool) -> None:
    """At every step of a run, the last included, whose variance the step before lends.

    What is added is compared by itself, which takes float64, since it is much smaller than x. The
    network speaks softly and x_0 is bounded: else the variance, an exponential of what it says, and
    with it x grow until a wavy classifier's answer depends on how x was rounded.
    """
    network = small_dit(learn_sigma=learned).double()
    network.final_layer.linear.weight.mul_(0.1)
    denoiser = ClassConditional(network, DDPM())
    x, y = batch()
    x, noise, bounds = x.double(), NoiseSource([0, 1, 2], [0, 0, 0]), (-1.0, 1.0)
    term = ClassifierGuidance(5.0, classifier=Classifier().double(), form="mean")
    asking = GuidedDenoiser(denoiser, [term], noise=noise)
    posterior, sampler = Posterior.of(DDPM().grid(5)), Ancestral()
    before = x
    for each in sampler.steps(lambda x_t, step: asking(x_t, step, y), x, DDPM(), 5, noise, bounds):
        i, step = each.step.index, each.step
        plain = denoiser(before, step.level, y)
        log_variance = sampler.log_variance(posterior, i, plain)
        unguided = posterior.of_x_0[i] * plain.x_0.clamp(*bounds) + posterior.of_x_t[i] * before
        if i < 4:
            unguided = unguided + torch.exp(0.5 * log_variance) * noise.like(x, i)
        shift = 5.0 * log_variance.exp() * gradient(before, float(step.level.t), y)
        assert_near(each.x - unguided, shift)
        before = each.x


@pytest.mark.parametrize(
    ("schedule", "form", "acts"),
    [("cosine", "score", False), ("cosine", "mean", True), ("linear", "score", True)],
)
def test_it_is_not_asked_of_pure_noise(schedule: Any, form: Any, acts: bool) -> None:
    """A cosine schedule's first step would multiply the classifier's error by 20,000."""
    term = ClassifierGuidance(1.0, classifier=nn.Identity(), form=form)
    process = DDPM(schedule)
    assert term.active(step_at(process, 0, 20)) is acts
    assert term.active(step_at(process, 1, 20))
    assert not ClassifierGuidance(1.0, classifier=nn.Identity()).active(step_at(Flow(), 0, 20))


def test_an_ideal_classifier_turns_no_class_into_a_class() -> None:
    """The score of p(x) with s = 1 gradient of log p(y | x) is the score of p(x | y)."""
    ideal = Ideal([-1.0, 0.2, 0.9], 0.3, (1, 2, 2))

    class Bayes(torch.nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            classes = [torch.full((len(x_t),), i) for i in range(3)]
            return torch.stack([ideal.log_density(x_t, int(t[0]), y) for y in classes], dim=1)

    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    # The network is asked for no class, the classifier for the image's own.
    term = ClassifierGuidance(1.0, classifier=Bayes())
    for index in (1, 5, 9):
        step = step_at(ideal.process, index)
        difference = GuidedDenoiser(ideal, [term])(x, step, y).v - ideal(x, step.level, y).v
        expected = ideal(x, step.level, y).v - ideal(x, step.level, ideal.null(3)).v
        torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-6)


def test_the_classifier_is_asked_in_the_first_round_and_within_max_rows() -> None:
    denoiser = MODELS["eps"]
    classifier, rows = Classifier(), []
    classifier.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    term = ClassifierGuidance(1.0, classifier=classifier)
    step = step_at(denoiser.process, 4)
    with counted(denoiser) as own:
        together = guided(denoiser, [term, SAG(0.5)], step)
        apart = guided(denoiser, [term, SAG(0.5)], step, max_rows=3)
    assert own == [3, 3, 3, 3] and rows == [3, 3]
    assert_near(together.v, apart.v)
    with torch.no_grad():
        assert_near(guided(denoiser, [term, SAG(0.5)], step).v, together.v)


def test_what_cannot_be_guided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set guidance\.classifier\.classifier"):
        ClassifierGuidance(1.0)
    with pytest.raises(ValueError, match="form='both'"):
        ClassifierGuidance(1.0, classifier=Classifier(), form="both")  # type: ignore[arg-type]
    mean = ClassifierGuidance(1.0, classifier=Classifier(), form="mean")
    with pytest.raises(ValueError, match=r"form='mean'.*Flow; use form='score'"):
        GuidedDenoiser(MODELS["flow"], [mean])
    assert ClassifierGuidance(0.0).off
    # A name is for the command line, which loads it.
    told = r"classifier=sag_dit.checkpoints.load_classifier\('mine.pt'\)"
    with pytest.raises(ValueError, match=told):
        GuidedDenoiser(MODELS["eps"], [ClassifierGuidance(1.0, classifier="mine.pt")])


@pytest.mark.parametrize(
    ("size", "classes", "told"),
    [
        ((8, 16), 10, r"sees images \(4, 8, 16\), and the model's are \(4, 8, 8\)"),
        ((8, 8), 11, "knows 11 classes, and the model 10"),
        ((8, 8), 10, None),
        (None, 11, None),
    ],
)
def test_a_classifier_that_says_its_size_has_to_fit(
    size: tuple[int, int] | None, classes: int, told: str | None
) -> None:
    classifier = Classifier()
    classifier.in_channels, classifier.input_size, classifier.num_classes = 4, size, classes  # type: ignore[assignment]
    term = ClassifierGuidance(1.0, classifier=classifier)
    if told is None:
        GuidedDenoiser(MODELS["eps"], [term])
    else:
        with pytest.raises(ValueError, match=told):
            GuidedDenoiser(MODELS["eps"], [term])
