"""Starting a command: Hydra with our configs, free-text values quoted, errors on one screen."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sag_dit.cli.help import help_text
from sag_dit.cli.orphans import end_with_parent
from sag_dit.cli.schema import check, free_text
from sag_dit.cli.typed import MULTIRUN, check_added, check_arguments, nearest, split
from sag_dit.cli.typed import config_folder as config_folder

QUOTATION = re.compile(r"""(['"])(\\.|(?!\1|\\).)*\1""", re.DOTALL)
"""A value that the user has quoted for Hydra."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that ends a process whatever it does; Windows knows one alone, which does."""

Run = Callable[[DictConfig], None]


def quoted(argument: str) -> str:
    """Quote the value of a free-text ``key=value`` for Hydra; other arguments stay as they are.

    A value that the user has quoted already, null, several samples in brackets and a mapping with
    ``_target_`` are left alone.
    """
    key, separator, value = argument.partition("=")
    if not separator or key.lstrip("+") not in free_text() or value in ("", "null"):
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


def _keys(config: object, prefix: str = "") -> list[str]:
    if not isinstance(config, Mapping):
        return []
    found = []
    for key, value in config.items():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found


def _explain(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """Return Hydra's own message, or where a key is unknown ours with the nearest keys."""
    message = str(error)
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message)
    if unknown is None:
        return message
    key = next(group for group in unknown.groups() if group)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        # With the user's choices of groups, since they bring keys of their own.
        groups = [each for each in arguments if (config_folder() / each.partition("=")[0]).is_dir()]
        config = OmegaConf.to_container(hydra.compose(config_name, groups), resolve=False)
    return f"{key}: no such key{nearest(key, _keys(config))}"


def _told(error: Exception) -> str:
    """Return what went wrong, without Hydra's words for the call in which it did."""
    cause = error.__cause__
    where = re.search(r"\nfull_key: (.+)$", str(error))
    if isinstance(error, InstantiationException) and where and isinstance(cause, ValueError):
        return f"{where[1]}: {cause}"
    return str(error)


def quiet_lightning() -> None:
    """Import Lightning and silence its list of devices and its tips; its warnings stay."""
    import lightning.pytorch

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def fail(message: str) -> NoReturn:
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
    end_with_parent()
    original = list(sys.argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Hydra swallows exceptions unless told to show them; they are ours to explain.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        keys, flags = split(arguments)
        if {"--help", "-h"} & set(flags):
            print(help_text(config_name, next((key for key in keys if "=" not in key), None)))
            return
        keys = check_arguments(config_name, keys, flags)
    except ValueError as error:
        fail(str(error))

    def job(config: DictConfig) -> None:
        # Other ranks are started with the arguments as the user wrote them; in a sweep, with those
        # of this setting.
        swept = any(flag in MULTIRUN for flag in flags)
        own = HydraConfig.get().overrides.task if swept else arguments
        sys.argv[:] = [original[0], *own]
        try:
            check(
                config_name,
                config,
                dict(key.lstrip("+").split("=", 1) for key in keys if "=" in key),
            )
            check_added(config_name, config, keys)
            run(config)
        except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
            if os.environ.get("SAG_DIT_DEBUG"):
                raise
            fail(_told(error))

    sys.argv[1:] = [*flags, *(quoted(key) for key in keys)]
    try:
        with leaving_when_told():
            hydra.main(
                config_path=str(config_folder()), config_name=config_name, version_base="1.3"
            )(job)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error, config_name, keys))
    finally:
        sys.argv[:] = original
