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

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""Errors that are the fault of the disk, not of the caller."""


LOCK = ".lock"
"""The file by which a run holds a folder."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an error of the disk within this context into one that names the file and the remedy.

    Raises:
        OSError: the disk is full, fails or takes nothing.
    """
    try:
        yield
    except Exception as error:
        reason = _fault_of_disk(error)
        if reason is None:
            raise
        raise OSError(
            f"{file} could not be written ({reason}). What was written before is intact: make "
            f"room, then repeat the command to go on"
        ) from error


def _fault_of_disk(error: Exception) -> str | None:
    """Return what is wrong with a disk, None if the error is not the disk's."""
    if isinstance(error, OSError) and error.errno in DISK:
        return error.strerror
    # torch and safetensors write files themselves, and have no OSError for it.
    if isinstance(error, OSError) or "os error" in str(error):
        found = re.search(r"([\w ]+) \(os error (\d+)\)", str(error))
        return found[1].strip() if found and int(found[2]) in DISK else None
    full = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return "the disk is full or fails" if full else None


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
def using(folder: Path) -> Iterator[None]:
    """Lock a folder for this run; of its ranks only the first calls this.

    The system frees the lock when the process ends, however it ends. Where there are no locks, as
    on some network file systems, or the folder cannot be written to, the run goes on without one.

    Raises:
        ValueError: another run holds it.
    """
    file = folder / LOCK
    held = _lock(file)
    try:
        yield
    finally:
        if held is not None:
            # While it is held: who waits for it then finds that it has gone, and makes another.
            file.unlink(missing_ok=True)
            os.close(held.pop())


def _lock(file: Path) -> list[int] | None:
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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # Removed by the run that had held it.
        except BlockingIOError as error:
            holder = os.read(descriptor, 300).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
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
