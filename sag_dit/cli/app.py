"""Starting a command: its arguments checked, signals, and errors on one screen."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sag_dit.cli.composing import (
    as_typed,
    check_target,
    checked_config,
    config_folder,
    drop_strangers,
    for_hydra,
    import_own,
    unresolved,
)
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.help import help_text
from sag_dit.cli.orphans import end_with_parent
from sag_dit.cli.sweep import Choice, expand
from sag_dit.cli.typed import (
    ANYTHING,
    HELP,
    check_added,
    check_arguments,
    is_group,
    is_null,
    keys_and_flags,
    known,
    only_with,
)
from sag_dit.files import using
from sag_dit.messages import nearest
from sag_dit.raised import kept_of, own_frames, raised_by, show

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that ends a process whatever it does; Windows knows one alone, which does."""

TOLD_TO_STOP = (signal.SIGINT, signal.SIGTERM)
"""Signals that tell a command to stop: Ctrl-C, and what schedulers send."""

OF_NO_USE = (
    r"`isinstance\(treespec",
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches .* is smaller than the logging interval",
    r".*does not have many workers",
    r"You're resuming from a checkpoint that ended before the epoch ended",
    r"Be aware that when using `ckpt_path`, callbacks",
    r"Total length of .* across ranks is zero",
    r"The dirpath has changed from",
    r"There is a wandb run already in progress",
    r"`precision=.*` is supported for historical reasons",
    r"The `srun` command is available",
    r".*`sync_dist=True`",
)
"""What Lightning warns of although a run of ours is right in doing so, as regular expressions."""

LOST = r"[Cc]onnection (closed|reset) by peer|[Bb]roken pipe|remote process exited"
"""What communication between ranks says when one of them is gone."""

SMALLER = {
    "train": "data.batch_size (in another out), or with checkpoint_blocks=true",
    "encode": "slice_size",
}
"""What takes less memory in a command, where it is not batch_size."""

Run = Callable[[Any], None]
"""A command, which takes an instance of its schema."""
Prepare = Callable[[str, Sequence[str]], Sequence[str]]
"""(command, arguments) -> the arguments with those that the user did not state."""


def explain(error: Exception, command: str, arguments: Sequence[str]) -> str:
    """Return in a sentence what Hydra or the system could not do; others say it themselves."""
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return (
            f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}); what is written is "
            f"kept: put that right, or choose another place, and repeat the command"
        )
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return message
    if isinstance(error, OverrideParseException):
        value = re.sub(r"^.*?=", "", error.override)
        return (
            f"{error.override}: {value or 'nothing'} cannot be read as a value; put text in "
            f'quotes, and of a list each name with a comma or a bracket, such as ["a, b",c]'
        )
    typed = {each.lstrip("+").partition("=")[0]: each for each in arguments}
    first = message.partition("\n")[0]
    unknown = re.search(
        r"(?:Could not override|Could not delete from config\.|Key) '([^']+)'(?! not found)", first
    )
    if unknown is None:
        inside = re.search(r"full_key: (\S+)", message)
        return f"{typed.get(inside[1], inside[1])}: {first}" if inside else first
    key = unknown[1]
    with_it = only_with(command, key)
    if with_it:
        told = " or ".join(f"experiment={each}" for each in with_it)
        return f"{typed.get(key, key)}: there is {key} with {told} alone; choose that as well"
    group = key.partition(".")[0]
    if "." in key and known(command, key) not in (None, ANYTHING) and is_group(group):
        return f"{typed.get(key, key)}: {is_null(group)}"
    # With the user's choices of groups, since they bring keys of their own.
    groups = [each for each in arguments if is_group(each.partition("=")[0])]
    close = nearest(key, _paths(unresolved(command, groups)))
    return f"{typed.get(f'~{key}', key)}: no such key{close}"


def _paths(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return []
    found = []
    for key, value in values.items():
        found += [f"{prefix}{key}", *_paths(value, f"{prefix}{key}.")]
    return found


def _told_by_lightning(error: Exception) -> bool:
    """Whether Lightning refuses a setting, as its callbacks do of a number that nobody logs."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and "lightning/pytorch/callbacks" in (
        Path(frames[-1].filename).as_posix()
    )


def sentence(error: Exception, command: str, arguments: Sequence[str]) -> str | None:
    """Return in a sentence what a user can mend, None of an error that is a mistake in code."""
    if isinstance(error, (ValueError, OSError, HydraException, OmegaConfBaseException)):
        return explain(error, command, arguments)
    if _told_by_lightning(error):
        return f"{error}; what is written is kept"
    if not isinstance(error, RuntimeError):
        return None
    first = str(error).partition("\n")[0]
    if re.search("out of memory", str(error), re.IGNORECASE):
        return (
            f"the memory of the device is full ({first[:200]}); what is written is kept: repeat "
            f"the command with a smaller {SMALLER.get(command, 'batch_size')}"
        )
    # A rank whose partner is gone; who started them says which was lost.
    if re.search(LOST, str(error)):
        return (
            f"the connection to another rank is lost ({first}); what is written is kept, repeat "
            f"the command to go on"
        )
    return None


def with_kept(told: str, error: Exception) -> str:
    """Return a sentence, and behind it what is kept where the sentence does not say so itself.

    Of an error in a user's code it is always told, since that names what failed.
    """
    kept = kept_of(error)
    says_so = re.search(r"\bkept\b|\bsaved at step\b", told) and own_frames(error) is None
    return told if kept is None or says_so else f"{told}; {kept}"


def quiet_lightning() -> None:
    """Import Lightning, silence its list of devices and its tips, and watch its ranks ourselves.

    Its warnings stay, and what a profiler or a summary of the layers has to tell.
    """
    import lightning.fabric.strategies.launchers.subprocess_script as of_fabric
    import lightning.pytorch
    import lightning.pytorch.strategies.launchers.subprocess_script as of_trainer

    from sag_dit.cli.stopping import watch_ranks

    launchers: list[Any] = [of_fabric, of_trainer]
    for each in launchers:
        each._launch_process_observer = watch_ranks

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers.profiler", "callbacks.model_summary"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for message in OF_NO_USE:
        warnings.filterwarnings("ignore", message=message)


def say(text: str) -> None:
    """Print a page of text, of which a reader such as ``head`` may take the beginning alone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> NoReturn:
    """Print an error on one screen and leave with exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def leave(number: int, _: FrameType | None) -> NoReturn:
    """Leave at a signal, through all that cleans up, with the shell's exit code for it."""
    raise SystemExit(128 + number)


def take_signals() -> dict[int, Any]:
    """Make Ctrl-C and SIGTERM leave; return their handlers before.

    Outside of the main thread Python allows no other handlers, and nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, leave) for number in TOLD_TO_STOP} if main else {}


@contextmanager
def leaving_when_told() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM leave with exit codes 130 and 143, and tell how to go on.

    Training and prediction then take the signals over. Within another such context nothing changes.
    """
    if signal.getsignal(signal.SIGINT) is leave:
        yield
        return
    before = take_signals()
    try:
        yield
    except SystemExit as stop:
        if stop.code in {128 + number for number in TOLD_TO_STOP} and is_first_rank():
            told = "what is finished is kept; repeat the command to go on"
            print(f"stopped: {getattr(stop, 'told', told)}", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def own_log() -> Iterator[None]:
    """End the run at Weights & Biases that a job began, since the next job would go on with it."""
    before = _wandb_run()
    yield
    begun = _wandb_run()
    if begun is not None and begun is not before:
        begun.finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def alone_in(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder for all ranks of this run, by the first of them.

    Runs that hold it ``shared`` let each other in.

    Raises:
        ValueError: another run is using it.
    """
    if is_first_rank():
        with using(folder, shared=shared):
            yield
    else:
        yield


def settings_of(command: str, arguments: Sequence[str]) -> list[Choice] | None:
    """Return the settings of a sweep, all checked before the first is run; None without ``-m``."""
    try:
        choices = expand(arguments)
        for choice in choices or ():
            check_arguments(command, *keys_and_flags(choice.arguments))
    except (ValueError, HydraException) as error:
        fail(explain(error, command, arguments))
    return choices


@leaving_when_told()
def launch(
    config_name: str,
    run: Run,
    argv: Sequence[str] | None = None,
    entry: Sequence[str] = (),
    prepare: Prepare | None = None,
) -> None:
    """Compose the configuration from the command line and run; never show a traceback for misuse.

    ``entry`` is what stands before the arguments where other ranks are started. ``prepare`` adds
    what a command chooses for the user. Of a sweep, every setting is a run of its own, in a folder
    of its own within the one that is stated. Misuse is a ValueError, an OSError or one of Hydra's
    own errors. Anything else is a mistake in code and keeps its traceback; of a mistake in a user's
    code it begins at that code.
    """
    end_with_parent()
    original = list(sys.argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if prepare is not None:
        arguments = list(prepare(config_name, arguments))
    # Hydra swallows exceptions unless told to show them; they are ours to explain.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        keys, flags = keys_and_flags(arguments)
        if set(HELP) & set(flags):
            say(help_text(config_name, keys[-1] if keys else None))
            return
    except ValueError as error:
        fail(str(error))
    choices = settings_of(config_name, arguments)
    if choices is not None:
        for number, choice in enumerate(choices, start=1):
            placed = choice.in_its_own_folder()
            if is_first_rank():
                folder = f", out={placed.out}" if placed.out else ""
                print(f"{number} of {len(choices)}: {choice.name}{folder}", flush=True)
            launch(config_name, run, placed.arguments, entry)
        return
    try:
        keys = check_arguments(config_name, keys, flags)
    except ValueError as error:
        fail(str(error))

    def job(config: DictConfig) -> None:
        # Other ranks are started with the arguments as the user wrote them.
        sys.argv[:] = [original[0], *entry, *arguments]
        try:
            drop_strangers(config, keys)
            values = checked_config(config_name, config, as_typed(keys))
            check_added(config_name, values, keys)
            import_own(getattr(values, "imports", None) or ())
            if isinstance(getattr(values, "vae", None), Mapping):
                # Named at the command line, and so imported: what is behind looks it up.
                check_target(values.vae, "vae")
            with own_log():
                run(values)
        except Exception as error:
            if os.environ.get("SAG_DIT_DEBUG"):
                raise
            told = sentence(error, config_name, keys)
            if told is not None:
                # A loader's failure is told when the step before is saved; of the user's code it
                # is shown.
                cause = error.__cause__ if kept_of(error) else None
                if (
                    isinstance(cause, Exception)
                    and own_frames(cause) is not None
                    and sentence(cause, config_name, keys) is None
                ):
                    show(cause)
                fail(with_kept(told, error))
            if own_frames(error) is None:
                raise
            show(error)
            fail(kept_of(error) or f"{raised_by(error)} failed")

    sys.argv[1:] = [*flags, *for_hydra(keys)]
    try:
        hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(
            job
        )()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, config_name, keys))
    except ValueError as error:  # Of a key of Hydra's own.
        own = " ".join(key for key in keys if key.lstrip("+").startswith("hydra"))
        fail(f"{own}: {error}")
    finally:
        sys.argv[:] = original
