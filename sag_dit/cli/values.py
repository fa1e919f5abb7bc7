"""Checking the values of a configuration before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml

from sag_dit.cli.composing import check_target, config_folder, fitted, make
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.keys import Attention, Evaluate, Guides

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.guidance import Term
    from sag_dit.process import Process
    from sag_dit.sampling import Search
    from sag_dit.traces import Maps

LIBRARIES = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}
"""What the loggers that are not ours need, one of each."""

AUTO = "sag_dit.sampler.auto"
"""The ``_target_`` of a sampler that follows from the model."""

MEASURED = 300
"""Images that evaluate.py draws of each setting unless told how many."""


def check_logger(logger: Mapping[str, Any] | None, where: str = "logger") -> None:
    """Refuse a logger that cannot log, before there is anything to log.

    Raises:
        ValueError: its library is missing, or Weights & Biases lets nobody in; the remedy is told.
    """
    if not logger:
        return
    target = str(logger.get("_target_"))
    needed = LIBRARIES.get(target.rpartition(".")[2], ())
    if needed and not any(find_spec(library) for library in needed):
        raise ValueError(
            f"{where}: {target} needs {needed[0]}, which is not installed; "
            f"pip install {needed[0]}, or choose logger=csv or logger=none"
        )
    check_target(logger, where)
    if needed == ("wandb",) and not logger.get("offline"):
        _check_login(logger.get("mode") or os.environ.get("WANDB_MODE") or "online")


def _check_login(mode: str) -> None:
    """Log in to Weights & Biases, on the first rank alone, unless its mode needs no login.

    Raises:
        ValueError: there is no such mode, or no key, the server refuses it, or is not reached.
    """
    if mode in ("offline", "dryrun", "disabled") or not is_first_rank():
        return
    import wandb

    try:
        wandb.Settings.model_validate({"mode": mode})
        if wandb.run is None:  # None of this process's own, such as of the settings of a sweep.
            wandb.login(verify=True)
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"logger=wandb: {reason}; run `wandb login` once, or work offline with "
            f"logger.offline=true, which logs into the run's folder for `wandb sync` to send later"
        ) from None


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


def why_not(term: Term, model: Model) -> str:
    """Return in words what a model lacks for a term, nothing where it can be guided by it.

    Example::

        if why_not(SAG(1.0), model):
            terms.remove("sag")
    """
    try:
        term.check(model.denoiser)
    except ValueError as error:
        # The key that it begins with and the remedy are for those who have stated it.
        return str(error).partition(": ")[2].partition(";")[0] or str(error)
    return ""


def as_callable(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what makes a thing to call: of a class an object, of a function the function itself.

    Raises:
        ValueError: there is no such thing, or it takes no such argument.
    """
    thing, _ = check_target(values, where)
    return {"_partial_": not isinstance(thing, type), **values}


def make_search(values: Mapping[str, Any] | None) -> Search | None:
    """Build the search; its verifier may be a function or a class of the user's own.

    A function is the verifier itself; a class is called to make one.

    Raises:
        ValueError: it names none, or no verifier.
    """
    from sag_dit.sampling import Search
    from sag_dit.search import CLASSIFIER

    if not values:
        return None
    verifier, where = values.get("verifier"), "search.verifier"
    if isinstance(verifier, str) and verifier != CLASSIFIER:
        if "." not in verifier:
            raise ValueError(
                f"{where}={verifier}: expected {CLASSIFIER}, or the name of a function or class, "
                f"such as MODULE.NAME"
            )
        verifier = {"_target_": verifier}
    if isinstance(verifier, Mapping):
        verifier = as_callable(verifier, where)
    given = {} if verifier is None else {"verifier": verifier}
    made: Search = make({**values, **given}, "search", Search)
    return made


def make_maps(wanted: Attention, model: Model, steps: int, guidance: Iterable[Term] = ()) -> Maps:
    """Build what to keep of attention from ``attention``'s values; ``steps`` are the run's.

    Without a threshold, masks are set as by the SAG of ``guidance``; the layers ``[auto]`` are
    those that it reads, and without it the one in the middle.

    Raises:
        ValueError: a value that cannot be meant, or a layer or step that does not exist.
    """
    from sag_dit.guidance import SAG
    from sag_dit.traces import Maps

    show, query = wanted.show, wanted.query
    used = next((term for term in guidance if isinstance(term, SAG) and not term.off), SAG())
    limit = used
    if wanted.threshold is not None:
        limit = SAG(threshold=float(wanted.threshold))
    layers = [*map(str, wanted.layers)]
    if layers == ["auto"]:
        layers = [layer.name for layer in used.layers(model.denoiser)]
    maps = Maps(
        layers=tuple(layers),
        steps=show if isinstance(show, int) else tuple(show),
        query=None if query is None else (float(query[0]), float(query[1])),
        limit=limit,
    )
    maps.layers_of(model.denoiser)
    maps.indices(steps)
    return maps
