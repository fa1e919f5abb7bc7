"""Every guidance method, switched on, and the kinds of model that each must guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.methods import classes, setting
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import (
    CFG,
    PAG,
    SAG,
    SEG,
    SWG,
    ClassifierGuidance,
    GuidedDenoiser,
    Rewriting,
    Term,
)
from sag_dit.models import DiT
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, Prediction, Process, Step
from tests.guidance.reference import step_at
from tests.small import filled

NOISE = NoiseSource([0, 0, 7], [4, 5, 6])


class Classifier(nn.Module):
    """A small classifier of noisy images; wavy, so that its gradient fades nowhere."""

    def __init__(self, shape: tuple[int, int, int] = (4, 8, 8), classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[0] * shape[1] * shape[2], classes)
        random = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
        self.requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.linear(x_t.flatten(1)).sin() * (1 + t.float()[:, None] / 1000)  # type: ignore[no-any-return]


def small_dit(seed: int = 0, **options: object) -> DiT:
    """A DiT of 4x4 tokens in two blocks, none of whose weights is zero."""
    defaults: dict[str, object] = {"hidden_size": 16, "depth": 2, "num_heads": 2}
    sizes: dict[str, object] = {"input_size": 8, "num_classes": 10, "learn_sigma": False}
    network = filled(DiT(**{**sizes, **defaults, **options}), seed)  # type: ignore[arg-type]
    return network.eval().requires_grad_(False)


PROCESSES: Mapping[str, tuple[Callable[[], Process], str]] = {
    "eps": (DDPM, "eps"),
    "eps, cosine": (lambda: DDPM("cosine"), "eps"),
    "v": (DDPM, "v"),
    "x_0": (DDPM, "x_0"),
    "flow": (Flow, "v"),
    "flow, x_0": (Flow, "x_0"),
}
MODELS = {
    name: ClassConditional(small_dit(), process(), kind=kind)  # type: ignore[arg-type]
    for name, (process, kind) in PROCESSES.items()
}
WORSE = {
    name: ClassConditional(small_dit(seed=9, depth=1), process(), kind=kind)  # type: ignore[arg-type]
    for name, (process, kind) in PROCESSES.items()
}


def every(model: str) -> dict[str, Term]:
    """All methods that guide a model of ``MODELS``, on."""
    objects = {"worse": WORSE[model], "classifier": Classifier()}
    flow = isinstance(MODELS[model].process, Flow)
    # A gradient of a classifier is small beside a prediction.
    terms = {
        kind.title: setting(kind, 7.0 if "classifier" in kind.needs else 0.7, **objects)
        for kind in classes()
        if (flow or "flow" not in kind.needs) and not kind.needs & {"text", "cross"}
    }
    terms |= {
        "CFG, rescaled": CFG(1.7, rescale=0.7),
        "CFG, channels": CFG(1.7, channels=3),
        "SAG, two layers": SAG(0.7, layer=(0, 1), quantile=0.6, blur_sigma=0.2, blur_in="grid"),
        "SAG, high frequency": SAG(0.7, mask="high_frequency"),
        "SAG, random": SAG(0.7, mask="random"),
        "SAG, square": SAG(0.7, mask="square"),
        "SAG, global": SAG(0.7, mask="global"),
        "SEG, finite": SEG(0.7, blur_sigma=0.8),
        "M-SWG": SWG(0.7, masked=True),
        "PAG, soft": PAG(0.7, softness=0.5),
        "PAG, heads": PAG(0.7, heads=[1]),
    }
    if not flow:
        terms["classifier, mean"] = ClassifierGuidance(7.0, classifier=Classifier(), form="mean")
    return terms


METHODS = sorted({name for model in MODELS for name in every(model)})
CELLS = [(model, name) for model in MODELS for name in every(model)]


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    """Noisy images and the classes they are asked for."""
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])[:rows]


def switched_off(term: Term) -> Term:
    """Return the term with all of its strengths neutral."""
    return replace(term, **dict.fromkeys(term.strengths, term.neutral))  # type: ignore[arg-type]


def edits_base(term: Term) -> bool:
    """Whether a term has the base itself asked otherwise, for all terms beside it too."""
    return isinstance(term, Rewriting)


def guided(
    model: ClassConditional,
    terms: list[Term],
    step: Step,
    *,
    max_rows: int | None = None,
    order: list[int] | None = None,
) -> Prediction:
    """The guided prediction of one step; ``order`` permutes the images with all that is theirs.

    Terms that act by what they remember have seen the step before.
    """
    x, y = batch()
    noise = NOISE
    if order is not None:
        x, y = x[order], y[order]
        noise = NoiseSource([NOISE.seeds[i] for i in order], [NOISE.indices[i] for i in order])
    asking = GuidedDenoiser(model, terms, noise=noise, max_rows=max_rows)
    if step.index and any(term.remembers and term.active(step) for term in terms):
        asking(1.1 * x, step_at(model.process, step.index - 1, step.count), y)
    return asking(x, step, y)
