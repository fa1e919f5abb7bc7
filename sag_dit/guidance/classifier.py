"""Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.term import Asking, Question, Term, ratio
from sag_dit.process import DDPM, NoiseLevel, Prediction, Step
from sag_dit.process.ddpm import CLEAN, Posterior
from sag_dit.sampler import Ancestral, Sampler
from sag_dit.tensors import Images, Labels

UNKNOWN = 1000.0
"""Above this ratio of noise to image, x_t knows nothing of its class."""


class Gradient(Denoiser):
    """A classifier of noisy images, asked as denoisers are: v is the gradient of log p(y | x_t).

    So its questions are batched with the others of a round and count towards ``max_rows``.
    ``network`` is any module (x_t, t) -> logits.

    Example::

        v = Gradient(classifier, denoiser).evaluate(x_t, t, labels)
    """

    def __init__(self, classifier: nn.Module, guided: Denoiser) -> None:
        super().__init__()
        self.network = classifier
        self.process = guided.process
        self.kind = "v"
        self.latent_shape = guided.latent_shape
        self.x_0_range = None
        self.layers = {}

    def evaluate(self, x_t: Images, t: Tensor, cond: Labels) -> Images:
        """Return grad_x log p(y | x_t)."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            chosen = self.network(x, t).log_softmax(dim=-1).gather(1, cond[:, None])
            (gradient,) = torch.autograd.grad(chosen.sum(), x)
        return gradient

    def null(self, count: int) -> Labels | None:
        """Return None: a classifier knows no null condition."""
        return None

    def join(self, conditions: Sequence[Labels]) -> Labels:
        """Concatenate labels."""
        return torch.cat(list(conditions))


@dataclass(frozen=True)
class ClassifierGuidance(Term):
    """eps - s sigma grad log p(y | x_t), where a classifier of noisy images says p; s = 0 is off.

    ``form`` is ``score``, as above, for any sampler: in v, -s sigma / alpha grad. If sigma / alpha
    is above 1,000 it does not act: x_t knows nothing of y there, so that the gradient is the
    classifier's error, which the first step of a cosine schedule would multiply by 20,000. The
    linear schedule begins at 160. ``mean`` shifts the mean of an ancestral step instead, as
    published for sampler=ddpm: mean + s variance grad, that is x_0 + s variance / c_0 grad, with
    c_0 the posterior's coefficient of x_0 and the variance that the network learned (else beta). A
    sampler that clamps x_0 does so before the classifier's shift, as the published code does.

    y are the classes that images are requested with. A UNet without classes is given the
    classifier's: its images are requested with those. ``classifier`` is any module (x_t, t) ->
    logits. At the command line it may be the name or path of a published one, which is loaded
    before anything is drawn.

    Published: ADM 256 s = 1 beside classes and 10 without, ADM 128 0.5.

    Source: algorithms 1 (mean) and 2 (score) of the paper.

    Raises:
        ValueError: there is no classifier, or it was not loaded; it sees other images or knows
            other classes than the model; the model is asked with text; or ``form`` is unknown, or
            ``mean`` for a process or sampler without ancestral steps.

    Example::

        from sag_dit.checkpoints import load_classifier

        classifier = load_classifier("ADM-classifier-128")
        sag_dit.sample(model, [3, 7], guidance=[ClassifierGuidance(0.5, classifier=classifier)])
    """

    key = "classifier"
    former = ("sag_dit.guidance.classifier.ClassifierGuidance",)
    title = "classifier guidance"
    does = "along a classifier's gradient"
    moves = "towards what a classifier recognises"
    look = "how well it shows what was asked for"
    source = "Dhariwal & Nichol 2021"
    needs = frozenset({"classes", "classifier"})
    search = MappingProxyType({"scale": (0.5, 10.0)})

    clamped: ClassVar[bool] = False

    _: KW_ONLY
    classifier: nn.Module | str | None = None
    """Published name, path, or a module (x_t, t) -> logits by _target_."""
    form: Literal["score", "mean"] = "score"
    """score, for any sampler; mean: as published, for sampler=ddpm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("score", "mean"):
            raise ValueError(f"form={self.form!r}: expected 'score' or 'mean'")
        if not self.off and self.classifier is None:
            raise ValueError(
                "classifier guidance needs a classifier of noisy images: set "
                "guidance.classifier.classifier to a published name or a path, or give classifier "
                "a module (x_t, t) -> logits"
            )

    def module(self) -> nn.Module:
        """Return the classifier, which a name alone is not.

        Raises:
            ValueError: it was named and not loaded.
        """
        if not isinstance(self.classifier, nn.Module):
            raise ValueError(
                f"classifier={self.classifier!r}: the command line loads it, and Python gives the "
                f"module itself: classifier=sag_dit.checkpoints.load_classifier("
                f"{self.classifier!r})"
            )
        return self.classifier

    def check(self, model: Denoiser) -> None:
        """Refuse models that are not asked with classes, a classifier of others, and a form."""
        super().check(model)
        if isinstance(model, TextConditional):
            raise ValueError(
                f"classifier_scale={self.scale}: {type(model.network).__name__} is asked with what "
                f"a pipeline tells it, and a classifier knows classes; use a model that "
                f"sag_dit.load reads, or set classifier_scale=0"
            )
        if isinstance(model, ClassConditional):
            check_fit(self.module(), model)
        if self.form == "mean" and not isinstance(model.process, DDPM):
            raise ValueError(
                f"form='mean': ancestral sampling is of variance-preserving models, and this "
                f"model's process is {type(model.process).__name__}; use form='score'"
            )

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse the mean form for a sampler without ancestral steps."""
        if self.form == "mean" and not isinstance(sampler, Ancestral):
            raise ValueError(
                f"classifier.form=mean: it shifts the mean of an ancestral step, and the sampler "
                f"is {type(sampler).__name__}; use sampler=ddpm, or guidance.classifier.form=score"
            )

    def active(self, step: Step) -> bool:
        """Whether it acts at this step."""
        known = self.form == "mean" or ratio(step.level) <= UNKNOWN
        return super().active(step) and known

    def class_names(self, model: Denoiser) -> tuple[str, ...]:
        """Return the numbers of the classifier's classes where the model itself has none."""
        if self.off or getattr(model.network, "num_classes", True):
            return ()
        known = getattr(self.module(), "num_classes", 0)
        return tuple(str(number) for number in range(known))

    def contribution(self, ask: Question) -> Asking:
        """Return the gradient as a change of v."""
        base = ask.base
        gradient = ask.memory.setdefault("gradient", Gradient(self.module(), base.model))
        gradient = gradient.to(base.x_t.device)
        clean, guiding = yield base, replace(base, model=gradient, edits=(), captures=())
        # How much of the gradient is added, for each unit of the scale.
        level = ask.step.level
        if self.form == "score":
            share: float | Tensor = ratio(level)
        else:
            share = variance_share(clean, ask.step, ask.memory.get("before")) / float(level.sigma)
        ask.memory["before"] = level
        return -self.scale * share * guiding.v


def check_fit(classifier: nn.Module, model: ClassConditional) -> None:
    """Refuse a classifier that says of itself that it is for other images or other classes.

    ADM's say so, with ``in_channels``, ``input_size`` and ``num_classes``. A module that states no
    size is taken as it is.

    Raises:
        ValueError: they differ; both sides are named.
    """
    size, known = getattr(classifier, "input_size", None), getattr(classifier, "num_classes", None)
    if not isinstance(size, tuple):
        return
    seen, drawn = (getattr(classifier, "in_channels", None), *size), model.latent_shape
    if seen != drawn:
        raise ValueError(
            f"the classifier sees images {seen}, and the model's are {drawn} (channels, height, "
            f"width); set guidance.classifier.classifier to one of the model's size"
        )
    if model.network.num_classes not in (0, known):
        raise ValueError(
            f"the classifier knows {known} classes, and the model {model.num_classes}, other "
            f"classes; use a classifier of the model's classes, or set classifier_scale=0"
        )


def variance_share(clean: Prediction, step: Step, before: NoiseLevel | None) -> Tensor:
    """Return variance / c_0 of an ancestral step: a change of x_0 that moves the mean by variance.

    ``before`` is the level of the step before. The last step's own posterior has no variance, so
    that of the step before is used for it.
    """
    if float(step.next.sigma) > 0:
        posterior, i = Posterior.of([step.level, step.next, CLEAN]), 0
    elif before is not None:
        posterior, i = Posterior.of([before, step.level, step.next]), 1
    else:
        posterior, i = Posterior.of([step.level, step.next]), 0
    fraction = clean.variance_fraction
    if fraction is None:
        log_variance = torch.tensor(posterior.log_large[i])
    else:
        log_variance = fraction * posterior.log_upper[i] + (1 - fraction) * posterior.log_lower[i]
    return log_variance.exp() / posterior.of_x_0[i]
