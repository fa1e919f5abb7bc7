"""Folders that one run at a time may use, and disks that do not take what is written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sag_dit import files
from sag_dit.files import atomic, using, writing

HOLDING = """
    import os, sys, time
    from pathlib import Path

    from sag_dit.files import using

    with using(Path(sys.argv[1])):
        # The process that is forked off says so itself, once it has begun.
        if sys.argv[2] == "alone" or os.fork() == 0:
            print("held", flush=True)
        time.sleep(60)
        os._exit(0)
"""


def hold(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    """Start a process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDING), str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize("how", ["alone", "forks"])
def test_a_folder_is_held_until_its_process_ends(tmp_path: Path, how: str) -> None:
    """However it ends; a process that was forked off, as a loader's, keeps nothing."""
    process = hold(tmp_path, how)
    try:
        with pytest.raises(ValueError, match="another run is using this folder") as refused:
            using(tmp_path).__enter__()
        assert f"process {process.pid} on" in str(refused.value)
        process.kill()
        process.wait()
        with using(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL) if how == "forks" else process.kill()
        process.communicate()


def test_a_folder_is_held_once_and_again_later(tmp_path: Path) -> None:
    with pytest.raises(KeyError), using(tmp_path):
        with pytest.raises(ValueError, match="another run"), using(tmp_path):
            pass
        raise KeyError
    with using(tmp_path):
        assert (tmp_path / files.LOCK).exists()


def test_where_there_are_no_locks_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with using(tmp_path), using(tmp_path):
            pass

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "open", read_only)
    with using(tmp_path):
        pass


TORCH = "[enforce fail at inline_container.cc:664] . unexpected pos 320 vs 214"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (RuntimeError(TORCH), "the disk is full or fails"),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device",
        ),
    ],
)
def test_a_disk_that_does_not_take_a_file(tmp_path: Path, error: Exception, reason: str) -> None:
    file = tmp_path / "a.ckpt"
    with pytest.raises(OSError) as told, atomic(file) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert str(told.value) == (
        f"{file} could not be written ({reason}). What was written before is intact: make room, "
        f"then repeat the command to go on"
    )
    assert list(tmp_path.iterdir()) == []


GONE = "Error while serializing: I/O error: No such file or directory (os error 2)"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no"), Exception(GONE)])
def test_a_folder_that_has_vanished_is_named(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "run" / "a.ckpt"
    with pytest.raises(FileNotFoundError) as told, writing(file), writing(file):
        raise error
    assert str(told.value) == (
        f"{file} could not be written: the folder {file.parent} is gone. Put it back and repeat "
        f"the command to go on; without it the command begins anew"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), FileNotFoundError(2, "no"), KeyError("a"), ValueError("b")]
)
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as told, writing(tmp_path / "a"):
        raise error
    assert told.value is error
