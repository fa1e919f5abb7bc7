"""Whose code failed: the part of the user's that raised an error, where, and how it is told."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType

AROUND = {
    *("sag_dit", "lightning", "pytorch_lightning", "lightning_utilities", "torch", "hydra"),
    *sys.stdlib_module_names,
}
"""Packages whose frames lead to the user's code: what runs it, and the standard library."""

HOOKS = "_call_callback_hooks"
"""The function of Lightning's that calls a hook of each callback."""


def is_ours(kind: type) -> bool:
    """Whether a class is of this package, and so of no user's."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


class KeptNote(str):
    """A note on an error (PEP 678) that says where a run failed and what of it is kept.

    Example:
        >>> KeptNote("the newest checkpoint is run/checkpoints/step-00000002.ckpt")
        'the newest checkpoint is run/checkpoints/step-00000002.ckpt'
    """


def kept_of(error: BaseException) -> KeptNote | None:
    """Return the note on an error that says what is kept, None if it has none."""
    notes = getattr(error, "__notes__", [])
    return next((each for each in notes if isinstance(each, KeptNote)), None)


def own_frames(error: BaseException) -> TracebackType | None:
    """Return the traceback from the first frame of the user's code on, None if there is none.

    Installed packages that are not in :data:`AROUND`, such as that of a logger, count as theirs. A
    hook of a callback that takes other arguments has no frame; that of its call stands for it.
    """
    found, call = error.__traceback__, None
    while found is not None and not _is_own(found.tb_frame):
        call = found if found.tb_frame.f_code.co_name == HOOKS else call
        found = found.tb_next
    if found is None and call is not None and call.tb_next is None:
        package = type(call.tb_frame.f_locals["callback"]).__module__.partition(".")[0]
        return None if package in AROUND else call
    return found


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in AROUND


def raised_by(error: BaseException) -> str | None:
    """Return the user's function that raised an error, and where, None if none of them did."""
    first = own_frames(error)
    if first is None:
        return None
    local = first.tb_frame.f_locals
    if not _is_own(first.tb_frame):
        return f"{type(local['callback']).__name__}.{local['hook_name']}"
    # What was called of the user's, and the last line of theirs that ran.
    code, owner = first.tb_frame.f_code, local.get("self")
    name = code.co_qualname if owner is None else f"{type(owner).__name__}.{code.co_name}"
    return f"{name} ({Path(raised_at(error)).name})"


def raised_at(error: BaseException) -> str:
    """Return the file and line of the user's that failed: the last one that ran, of any if none is.

    Example:
        >>> try:
        ...     {}["lost"]
        ... except KeyError as error:
        ...     print(raised_at(error).partition(", ")[2])
        line 2
    """
    frames = [*traceback.walk_tb(error.__traceback__)]
    own = [(frame, line) for frame, line in frames if _is_own(frame)]
    for frame, line in reversed(own or frames):
        return f"{frame.f_code.co_filename}, line {line}"
    return "no line is known"


def failure(error: BaseException) -> str:
    """Return in a line the kind of an error, what it says, and the user's line that failed.

    Example:
        >>> failure(KeyError("lr"))
        "KeyError: 'lr' (no line is known)"
    """
    said = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {said} ({raised_at(error)})"


def reason_of(error: BaseException) -> str:
    """Return what an error says; of a mistake in code :func:`failure`, which says where it is.

    Example:
        >>> reason_of(OSError("the disk is full"))
        'the disk is full'
    """
    return str(error) if isinstance(error, (ValueError, OSError)) else failure(error)


def unknown_argument(error: Exception) -> str | None:
    """Return the argument that a call was given and does not take, None of any other error.

    Example:
        >>> unknown_argument(TypeError("f() got an unexpected keyword argument 'um'"))
        'um'
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return None if found is None else found[1]


def show(error: Exception) -> None:
    """Print the traceback of an error on stderr, from the user's code on if there is any."""
    told = traceback.TracebackException(
        type(error), error, own_frames(error) or error.__traceback__, compact=True
    )
    notes = getattr(error, "__notes__", None) or []
    # What is kept has a line of its own.
    told.__notes__ = [each for each in notes if not isinstance(each, KeptNote)]
    print("".join(told.format()), file=sys.stderr, end="")
