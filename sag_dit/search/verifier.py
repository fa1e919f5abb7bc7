"""Verifiers: (images, condition) -> scores, and the search that asks one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from sag_dit import checkpoints
from sag_dit.checkpoints import Model
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.evaluation.classifier import KINDS, SmallClassifier, bundled_classifier
from sag_dit.evaluation.scores import Verifier as Verifier
from sag_dit.evaluation.scores import is_metric, scores_of, verifier_identity
from sag_dit.identity import name_of, settings
from sag_dit.sampling import Request, Search, Settings, short_repr
from sag_dit.tensors import Images, Labels

CLASSIFIER = "classifier"
"""The verifier that knows the classes of a bundled model."""


class ClassVerifier(nn.Module):
    """log p(class | image), by the small classifier that comes with a bundled data set.

    It has been trained on clean images, so it says of a noisy one what it would be taken for.

    Example:
        >>> verifier = ClassVerifier(bundled_classifier("digits"))
        >>> verifier(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2])
    """

    key = CLASSIFIER

    def __init__(self, classifier: SmallClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Images, labels: Labels) -> Tensor:
        """Return the logarithm of the probability of each image's class."""
        logits = self.classifier((images * 255).round().to(torch.uint8)).logits
        chosen: Tensor = logits.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
        return chosen


@cache
def _class_verifier(name: str) -> tuple[ClassVerifier, tuple[str, ...]]:
    """Return a bundled classifier, and the classes that it knows."""
    return ClassVerifier(bundled_classifier(name)), checkpoints.load(name).class_names


def class_verifier(model: Model) -> ClassVerifier:
    """Return the bundled classifier that knows a model's classes.

    Raises:
        ValueError: there is none.
    """
    channels, height, width = model.image_shape
    for name, kind in KINDS.items():
        if (kind.channels, kind.size, kind.size) == (channels, height, width):
            verifier, classes = _class_verifier(name)
            if tuple(model.class_names) == tuple(classes):
                return verifier
    raise ValueError(
        f"search.verifier={CLASSIFIER}: the bundled classifiers know the classes of "
        f"{', '.join(KINDS)}, not those of {model.name}; give a verifier of your own, "
        f"search.verifier=MODULE.FUNCTION, that takes (images, condition) and returns scores"
    )


@dataclass(frozen=True)
class Judge:
    """A verifier as searches ask it: uint8 images and their requests -> scores, in float64.

    ``size`` images at once, copies of the last one filling them up, so that no score depends on how
    many there are. A torchmetrics metric that is better when it is lower counts negatively.

    Example::

        judge = Judge(verifier, model, size=16)
        scores = judge(images, requests)
    """

    verifier: Verifier
    model: Model
    size: int

    def __call__(
        self, images: UInt8[Tensor, "b c h w"], requests: Sequence[Request]
    ) -> Float64[NDArray[np.float64], "b"]:
        """Return the scores of images.

        Raises:
            ValueError: the verifier returned something else than a finite number for each image.
        """
        rows = [*range(len(images)), *[len(images) - 1] * (self.size - len(images))]
        asked = [requests[row] for row in rows]
        pixels = images[rows].float() / 255
        said = scores_of(
            self.verifier, pixels, self._condition(asked, pixels), f"the verifier {self}"
        )
        lower = is_metric(self.verifier) and self.verifier.higher_is_better is False  # type: ignore[attr-defined]
        scores = (-said if lower else said).numpy()
        found: NDArray[np.float64] = scores[: len(images)]
        for request, score in zip(requests, found.tolist(), strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"the verifier {self} returned {score} for image {request.index}: expected "
                    f"finite scores"
                )
        return found

    def __str__(self) -> str:
        return name_of_verifier(self.verifier)

    def _condition(self, requests: Sequence[Request], images: Images) -> Any:
        labels = [request.label for request in requests]
        if isinstance(self.model.denoiser, TextConditional):
            return [self.model.class_names[each] for each in labels]
        return images.new_tensor(labels).long()


def name_of_verifier(verifier: object) -> str:
    """Return what texts call a verifier: the name of its function or class.

    Example:
        >>> name_of_verifier(partial(max, 1))
        'max'
    """
    kind = verifier.func if isinstance(verifier, partial) else verifier
    return str(getattr(kind, "__qualname__", type(kind).__name__))


class Verified(Search):
    """What all searches share: a verifier, by its word or as it is.

    Example::

        judge = BestOf(8).judge(model, settings)
        scores = judge(images, requests)
    """

    verifier: Verifier | str

    @property
    def told_verifier(self) -> str:
        """What texts call the verifier."""
        return "the classifier" if self.verifier == CLASSIFIER else name_of_verifier(self.verifier)

    def judge(self, model: Model, settings: Settings) -> Judge:
        """Return the verifier as it is asked about a model's images."""
        return Judge(self._verifier(model), model, settings.batch_size)

    def check(self, model: Model, settings: Settings) -> None:
        """Refuse a verifier that cannot score a batch of grey images; see :meth:`Search.check`."""
        judge = replace(self.judge(model, settings), size=2)
        grey = torch.full((2, *model.image_shape), 127, dtype=torch.uint8)
        asked = [Request(index, 0, 0, index) for index in range(2)]
        try:
            judge(grey.to(model.denoiser.device), asked)
        except ValueError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the verifier {judge} failed on two grey images ({type(error).__name__}: "
                f"{reason}); it gets float32 images {tuple(grey.shape)} in [0, 1] and what was "
                f"asked for, and returns a score for each"
            ) from error

    def identity(self, model: Model) -> dict[str, Any]:
        """Return the search's options and its verifier; see :meth:`Search.identity`."""
        options: Mapping[str, Any] = settings(self)
        verifier = verifier_identity(self._verifier(model))
        return {"name": name_of(type(self)), **options, "verifier": verifier}

    def _verifier(self, model: Model) -> Verifier:
        if self.verifier == CLASSIFIER:
            return class_verifier(model)
        if not callable(self.verifier):
            raise ValueError(
                f"search.verifier={short_repr(self.verifier)}: expected {CLASSIFIER}, or a "
                f"function or module that takes (images, condition) and returns scores"
            )
        return self.verifier


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"search.{name}={short_repr(value)}: expected {least} or more")
