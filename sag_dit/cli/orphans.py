"""Ranks that Lightning has started end with the process that started them.

A process that is killed takes no other with it: its ranks would go on drawing for a set that nobody
finishes, or wait for it at a collective, and hold their devices.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "SAG_DIT_PARENT"
"""The environment variable by which a rank learns who has started it."""
PR_SET_PDEATHSIG = 1
"""Linux's prctl option: the signal that a process gets when the thread that started it ends."""
KILL = int(getattr(signal, "SIGKILL", signal.SIGTERM))
EVERY = 0.5
"""Seconds between two looks for the parent, where the system does not tell of its end."""


def end_with_parent() -> None:
    """End this process when the one that has started it does, and hand our own pid down.

    Called first thing, before anything slow is imported. A process that no other process of ours
    has started, by hand or by torchrun or SLURM, is left alone.
    """
    parent = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    # Lightning's launcher says which rank it starts; other children are none.
    if parent is None or "LOCAL_RANK" not in os.environ or not _started_by(int(parent)):
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, KILL)
        # It may have ended before we asked to be told.
        if os.getppid() != int(parent):
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()


def _started_by(parent: int) -> bool:
    """Whether a process started this one: it is the parent, or was and has ended."""
    return os.getppid() == parent or not _exists(parent)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
