"""Checking the values of a configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sag_dit.cli.app import config_folder

if TYPE_CHECKING:
    from torch import nn

    from sag_dit.checkpoints import Model
    from sag_dit.guidance import Term
    from sag_dit.output.attention import Maps

LIBRARIES = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}
"""What the loggers that are not ours need, one of each."""

MEASURED = 300
"""Images that evaluate.py draws of each setting unless told how many."""


def check_logger(logger: DictConfig | None) -> None:
    """Refuse a logger whose library is not installed, before there is anything to log.

    Raises:
        ValueError: the library is missing; how to install it is told.
    """
    if logger is None or "_target_" not in logger:
        return
    needed = LIBRARIES.get(str(logger["_target_"]).rpartition(".")[2], ())
    if needed and not any(find_spec(library) for library in needed):
        raise ValueError(
            f"logger: {logger['_target_']} needs {needed[0]}, which is not installed; "
            f"pip install {needed[0]}, or choose logger=csv or logger=none"
        )


def check_requests(config: DictConfig) -> None:
    """Refuse keys that choose images where a file of requests does; at their defaults they rest.

    Raises:
        ValueError: such a key is set.
    """
    if config.requests is None:
        return
    command = "evaluate" if "seeds" in config else "sample"
    own: Any = OmegaConf.load(config_folder() / f"{command}.yaml")
    if own.num_images is None:
        own.num_images = MEASURED
    for key in ("seeds", "num_images", "seed", "classes"):
        default = own.get(key)
        value = OmegaConf.select(config, key, default=default)
        if value != default:
            raise ValueError(
                f"{key}={value} beside requests={config.requests}: the file's lines say which "
                f"images are drawn, each with a seed and a class of its own; leave {key} out, or "
                f"set {key}={'null' if default is None else default} beside an experiment"
            )


def make_terms(guidance: DictConfig) -> dict[str, Term]:
    """Build the guidance terms by name; an entry that is null is none.

    Raises:
        ValueError: an entry that names no term.
    """
    from sag_dit.guidance import Term

    terms: dict[str, Term] = {}
    for name, node in guidance.items():
        if node is None:
            continue
        if not OmegaConf.is_dict(node) or "_target_" not in node:
            raise ValueError(
                f"guidance.{name!s}={node!r}: expected a mapping with _target_, the class of a term"
            )
        term = instantiate(node, _convert_="all")
        if not isinstance(term, Term):
            raise ValueError(
                f"guidance.{name!s}: {node['_target_']} is no guidance method; expected a subclass "
                f"of sag_dit.guidance.Term"
            )
        terms[str(name)] = term
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


def make_maps(config: DictConfig, model: Model, steps: int, guidance: Iterable[Term] = ()) -> Maps:
    """Build what to keep of attention from ``attention``'s values.

    Without a threshold, masks are set as by the SAG of ``guidance``.

    Raises:
        ValueError: a value that cannot be meant, or a layer or step that does not exist.
    """
    from sag_dit.guidance import SAG
    from sag_dit.output.attention import Maps

    wanted: Any = OmegaConf.to_container(config.attention, resolve=True)
    layers, show, query = wanted["layers"], wanted["show"], wanted["query"]
    limit = next((term for term in guidance if isinstance(term, SAG) and not term.off), SAG())
    if wanted["threshold"] is not None:
        limit = SAG(threshold=float(wanted["threshold"]))
    maps = Maps(
        layers=tuple(map(str, layers)),
        steps=show if isinstance(show, int) else tuple(show),
        query=None if query is None else (float(query[0]), float(query[1])),
        limit=limit,
    )
    maps.layers_of(model.denoiser)
    maps.indices(steps)
    return maps
