"""Checking the values of a configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml

from sag_dit.cli.composing import check_target, config_folder, fitted, make
from sag_dit.cli.keys import Attention, Evaluate, Guides

if TYPE_CHECKING:
    from torch import nn

    from sag_dit.checkpoints import Model
    from sag_dit.guidance import Term
    from sag_dit.process import Process
    from sag_dit.traces import Maps

LIBRARIES = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}
"""What the loggers that are not ours need, one of each."""

AUTO = "sag_dit.sampler.auto"
"""The ``_target_`` of a sampler that follows from the model."""

MEASURED = 300
"""Images that evaluate.py draws of each setting unless told how many."""


def check_logger(logger: Mapping[str, Any] | None) -> None:
    """Refuse a logger whose library is not installed, before there is anything to log.

    Raises:
        ValueError: the library is missing; how to install it is told.
    """
    if not logger:
        return
    target = str(logger.get("_target_"))
    needed = LIBRARIES.get(target.rpartition(".")[2], ())
    if needed and not any(find_spec(library) for library in needed):
        raise ValueError(
            f"logger: {target} needs {needed[0]}, which is not installed; "
            f"pip install {needed[0]}, or choose logger=csv or logger=none"
        )
    check_target(logger, "logger")


def own_sampler(settings: Mapping[str, Any], process: Process) -> dict[str, Any]:
    """Return the settings of a sampler; where ``auto`` is asked for, those of the model's own.

    Raises:
        ValueError: an option of ``auto`` that the model's own sampler cannot have.
    """
    if not is_auto(settings):
        return dict(settings)
    from sag_dit.sampler import auto

    chosen = auto(process, **fitted(settings, "sampler", [AUTO]))
    listed = yaml.safe_load((config_folder() / "sampler" / f"{chosen.key}.yaml").read_text())
    return {key: getattr(chosen, key, value) for key, value in listed.items()}


def is_auto(settings: Mapping[str, Any]) -> bool:
    """Whether the sampler follows from the model."""
    return settings.get("_target_") == AUTO


def check_requests(config: Guides) -> None:
    """Refuse keys that choose images where a file of requests does; at their defaults they rest.

    Raises:
        ValueError: such a key is set.
    """
    if config.requests is None:
        return
    command = "evaluate" if isinstance(config, Evaluate) else "sample"
    own = yaml.safe_load((config_folder() / f"{command}.yaml").read_text())
    own["num_images"] = own["num_images"] or MEASURED
    for key in ("seeds", "num_images", "seed", "classes"):
        default = own.get(key)
        value = getattr(config, key, default)
        if value != default and not (key == "num_images" and value is None):
            raise ValueError(
                f"{key}={value} beside requests={config.requests}: the file's lines say which "
                f"images are drawn, each with a seed and a class of its own; leave {key} out, or "
                f"set {key}={'null' if default is None else default} beside an experiment"
            )


def make_terms(guidance: Mapping[str, Any], where: str = "guidance") -> dict[str, Term]:
    """Build the guidance terms by name; an entry that is null is none.

    ``where`` is the key at which they stand.

    Raises:
        ValueError: an entry that names no term.
    """
    from sag_dit.guidance import Term

    terms: dict[str, Term] = {}
    for name, node in guidance.items():
        if node is not None:
            terms[name] = make(node, f"{where}.{name}", Term)
    return terms


def with_models(terms: Mapping[str, Term]) -> dict[str, Term]:
    """Return the terms with the models that those that are on name by a path or a name loaded.

    Raises:
        ValueError: one is not found, damaged, or of another kind.
    """
    from sag_dit.guidance import Autoguidance, ClassifierGuidance

    made = dict(terms)
    for name, term in terms.items():
        if term.off:
            continue
        if isinstance(term, Autoguidance) and term.ckpt is not None:
            worse = _worse_model(term.ckpt, bool(term.ema))
            # A folder's name tells the worse model by its weights, so that its path is no part.
            made[name] = replace(term, ckpt=None, ema=None, worse=worse)
        elif isinstance(term, ClassifierGuidance) and isinstance(term.classifier, str):
            made[name] = replace(term, classifier=_classifier(term.classifier))
    return made


@cache
def _worse_model(ckpt: str, ema: bool) -> nn.Module:
    """Return a worse model, read once for all rows of a comparison and all jobs of a sweep."""
    from sag_dit.checkpoints import load_denoiser

    return load_denoiser(ckpt, ema=ema)


@cache
def _classifier(name: str) -> nn.Module:
    """Return a classifier, read once as well."""
    from sag_dit.checkpoints import load_classifier

    return load_classifier(name)


def make_maps(wanted: Attention, model: Model, steps: int, guidance: Iterable[Term] = ()) -> Maps:
    """Build what to keep of attention from ``attention``'s values.

    Without a threshold, masks are set as by the SAG of ``guidance``.

    Raises:
        ValueError: a value that cannot be meant, or a layer or step that does not exist.
    """
    from sag_dit.guidance import SAG
    from sag_dit.traces import Maps

    show, query = wanted.show, wanted.query
    limit = next((term for term in guidance if isinstance(term, SAG) and not term.off), SAG())
    if wanted.threshold is not None:
        limit = SAG(threshold=float(wanted.threshold))
    maps = Maps(
        layers=tuple(map(str, wanted.layers)),
        steps=show if isinstance(show, int) else tuple(show),
        query=None if query is None else (float(query[0]), float(query[1])),
        limit=limit,
    )
    maps.layers_of(model.denoiser)
    maps.indices(steps)
    return maps
