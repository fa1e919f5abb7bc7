"""Files that appear whole or not at all, folders of one run, and errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
"""Errors that are the fault of the disk, not of the caller."""


LOCK = ".lock"
"""The file by which a run holds a folder."""


class InUse(ValueError):
    """Another run holds a folder.

    Example::

        with suppress(InUse), using(folder):
            print("nobody else is working here")
    """


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an error of the disk within this context into one that names the file and the remedy.

    Raises:
        OSError: the disk is full, fails or takes nothing, or the file's folder is gone.
    """
    try:
        yield
    except Exception as error:
        number, reason = _of_system(error)
        if number == errno.ENOENT and not file.parent.is_dir():
            raise FileNotFoundError(
                f"{file} could not be written: the folder {file.parent} is gone. Put it back and "
                f"repeat the command to go on; without it the command begins anew"
            ) from error
        if number not in DISK:
            raise
        raise OSError(
            f"{file} could not be written ({reason}). What was written before is intact: make "
            f"room, then repeat the command to go on"
        ) from error


def _of_system(error: Exception) -> tuple[int | None, str]:
    """Return the number and the words of the system's error behind another; None if it is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or ""
    # torch and safetensors write files themselves, and have no OSError for it.
    if found := re.search(r"([\w ]+) \(os error (\d+)\)", str(error)):
        return int(found[2]), found[1].strip()
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return errno.EIO, "the disk is full or fails"
    return None, ""


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``file``, and rename it to ``file`` if all went well.

    The temporary name holds the number of the process, so that two processes never write one file.
    A file that a killed process left behind is overwritten or ignored.

    Raises:
        OSError: as :func:`writing`.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with writing(file):
            yield temporary
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def using(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder for this run; of its ranks only the first calls this.

    The system frees the lock when the process ends, however it ends. Where there are no locks, as
    on some network file systems, or the folder cannot be written to, the run goes on without one.
    Runs that all take the lock ``shared`` let each other in, and nobody else.

    Raises:
        InUse: another run holds it.
    """
    file = folder / LOCK
    held = _lock(file, shared)
    try:
        yield
    finally:
        if held is not None:
            # While it is held: who waits for it then finds that it has gone, and makes another.
            if not shared or _is_last(held[0]):
                file.unlink(missing_ok=True)
            os.close(held.pop())


def _is_last(descriptor: int) -> bool:
    """Whether nobody else shares a lock; it is then held alone."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock(file: Path, shared: bool) -> list[int] | None:
    """Return the descriptor of a locked file, None where there are no locks.

    The list is empty once the descriptor is closed: processes that are forked off share the lock,
    and would keep it beyond the end of this one, so they close it.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # Removed by the run that had held it.
        except BlockingIOError as error:
            holder = os.read(descriptor, 300).decode(errors="replace")
            os.close(descriptor)
            raise InUse(
                f"another run is using this folder: {file.parent} ({holder}); wait for it to end, "
                f"or choose another out"
            ) from error
        except OSError:
            os.close(descriptor)
            return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    held = [descriptor]

    def forget() -> None:
        if held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=forget)
    return held


def file_sha256(file: Path) -> str:
    """Return the sha256 of what a file holds."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_cache() -> Path:
    """Return $SAG_DIT_CACHE, or sag_dit in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAG_DIT_CACHE") or Path(home) / "sag_dit").expanduser()
