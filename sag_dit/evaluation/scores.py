"""Verifiers, (images, condition) -> a score for each image: how they are asked, and told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sag_dit.identity import name_of, plain, settings
from sag_dit.tensors import Images

Verifier: TypeAlias = Callable[[Images, Any], Any]
"""(images, condition) -> a score for each image.

Images are float32 (b, c, h, w) in [0, 1]. The condition is what was asked for: class numbers (b,),
or of a text model a list of b prompts; None where that is not known. A score must not depend on the
other images.
"""


def scores_of(verifier: Verifier, images: Images, condition: Any, told: str) -> Tensor:
    """Return a verifier's scores of images, float64 (b,) on the CPU; a module is moved to them.

    A torchmetrics metric is asked about one image at a time, since it would return one number for
    all of them. ``told`` names the verifier in the error.

    Raises:
        ValueError: it returned something else than one score for each image.

    Example:
        >>> scores_of(lambda images, _: images.mean((1, 2, 3)), torch.ones(2, 3, 8, 8), None, "it")
        tensor([1., 1.], dtype=torch.float64)
    """
    if isinstance(verifier, nn.Module):
        verifier.to(images.device).eval()
    with torch.no_grad():
        said = _one_by_one if is_metric(verifier) else _at_once
        scores = torch.as_tensor(said(verifier, images, condition)).detach().double().cpu()
    if scores.shape != (len(images),):
        raise ValueError(
            f"{told} returned {tuple(scores.shape)} for {len(images)} images: expected one score "
            f"for each, shape ({len(images)},)"
        )
    return scores


def _at_once(verifier: Verifier, images: Images, condition: Any) -> Any:
    return verifier(images, condition)


def _one_by_one(metric: Any, images: Images, condition: Any) -> list[float]:
    takes = len(signature(metric.update).parameters)
    found = []
    for place in range(len(images)):
        metric.reset()
        own = None if condition is None else condition[place : place + 1]
        found.append(float(metric(images[place : place + 1], *((own,) if takes > 1 else ()))))
    metric.reset()
    return found


def is_metric(verifier: object) -> bool:
    """Whether it is torchmetrics'; where that is not imported, nothing is."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(verifier, library.Metric)


def verifier_identity(verifier: Verifier) -> Any:
    """Return what the scores of a verifier depend on, as far as can be told, as plain values.

    That is its own ``protocol`` where it has one. Else a function is told by its name, a module by
    its weights, another object by its attributes.
    """
    protocol = getattr(verifier, "protocol", None)
    if isinstance(protocol, Mapping):
        return {"name": name_of(type(verifier)), **plain(protocol)}
    if isinstance(verifier, (partial, nn.Module, type)) or hasattr(verifier, "__qualname__"):
        return plain(verifier)
    options = settings(verifier) if is_dataclass(verifier) else plain(vars(verifier))
    return {"name": name_of(type(verifier)), **options}
