"""Starting a command: Hydra with our configs, free-text values quoted, errors on one screen."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sag_dit.methods import entries, scales

FREE_TEXT = (
    *("ckpt", "out", "requests", "vae", "data.root", "prompt", "text.negative"),
    *("samples", "reference", "against", "finished", "features.weights"),
    *("guidance.auto.ckpt", "guidance.classifier.classifier"),
)
"""Keys whose values may hold anything, so that Hydra's grammar must not read them."""

QUOTATION = re.compile(r"""(['"])(\\.|(?!\1|\\).)*\1""", re.DOTALL)
"""A value that the user has quoted for Hydra."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that ends a process whatever it does; Windows knows one alone, which does."""

Run = Callable[[DictConfig], None]


def config_folder() -> Path:
    """Return the folder of configurations: inside an installed wheel, else beside the package.

    Hydra is told what stands in no file, since it follows from the guidance methods.
    """
    store = ConfigStore.instance()
    store.store(name="scales", node=scales())
    store.store(group="guidance", name="methods", node=entries())
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def quoted(argument: str) -> str:
    """Quote the value of a free-text ``key=value`` for Hydra; other arguments stay as they are.

    A value that the user has quoted already, null, several samples in brackets and a mapping with
    ``_target_`` are left alone.
    """
    key, separator, value = argument.partition("=")
    if not separator or key.lstrip("+") not in FREE_TEXT or value in ("", "null"):
        return argument
    if QUOTATION.fullmatch(value) or (key == "samples" and value.startswith("[")):
        return argument
    if value.startswith("{") and "_target_" in value:
        return argument
    # Within Hydra's quotes a backslash means itself unless quotes follow it.
    value = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", literal(value))
    value = re.sub(r"(\\+)$", lambda m: m[1] * 2, value)
    return f"{key}='{value}'"


def literal(value: str) -> str:
    """Escape what OmegaConf would take for an interpolation, so that the text means itself."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known keys, or nothing if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"\nDid you mean {' or '.join(matches)}?" if matches else ""


def _keys(config: object, prefix: str = "") -> list[str]:
    if not isinstance(config, Mapping):
        return []
    found = []
    for key, value in config.items():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found


def _explain(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """Return Hydra's own message, with the nearest keys where a key is unknown."""
    message = str(error)
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message)
    if unknown is None:
        return message
    key = next(group for group in unknown.groups() if group)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        # With the user's choices of groups, since they bring keys of their own.
        groups = [each for each in arguments if (config_folder() / each.partition("=")[0]).is_dir()]
        config = OmegaConf.to_container(hydra.compose(config_name, groups), resolve=False)
    return message + nearest(key, _keys(config))


def quiet_lightning() -> None:
    """Import Lightning and silence its list of devices and its tips; its warnings stay."""
    import lightning.pytorch

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def fail(message: str) -> None:
    """Print an error on one screen and leave with exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def leave(number: int, _: FrameType | None) -> NoReturn:
    """Leave at a signal, through all that cleans up, with the shell's exit code for it."""
    raise SystemExit(128 + number)


def take_sigterm() -> Any:
    """Make SIGTERM leave; return the handler before, None where Python allows no other.

    That is outside of the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, leave) if main else None


@contextmanager
def leaving_when_told() -> Iterator[None]:
    """Make SIGTERM leave with exit code 143; training and prediction then take it over."""
    before = take_sigterm()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def launch(config_name: str, run: Run, argv: Sequence[str] | None = None) -> None:
    """Compose the configuration from the command line and run; never show a traceback for misuse.

    Misuse is a ValueError, an OSError or one of Hydra's own errors. Anything else is our mistake
    and keeps its traceback.
    """
    original = list(sys.argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Hydra swallows exceptions unless told to show them; they are ours to explain.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    def job(config: DictConfig) -> None:
        # Other ranks are started with the arguments as the user wrote them.
        sys.argv[:] = [original[0], *arguments]
        try:
            run(config)
        except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
            if os.environ.get("SAG_DIT_DEBUG"):
                raise
            fail(str(error))

    sys.argv[1:] = [quoted(argument) for argument in arguments]
    try:
        with leaving_when_told():
            hydra.main(
                config_path=str(config_folder()), config_name=config_name, version_base="1.3"
            )(job)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error, config_name, arguments))
    finally:
        sys.argv[:] = original
