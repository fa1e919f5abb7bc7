"""The lock of a study's journal of trials, which ends with the process that holds it."""

from __future__ import annotations

from pathlib import Path


class JournalLock:
    """Lets one process at a time write to a journal; the system frees it when a process is killed.

    Optuna's own locks are files that a killed process leaves behind. The next one waits for them,
    for ever where the journal's path is relative.

    Example::

        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend("trials.log", JournalLock(Path("trials.log")))
    """

    def __init__(self, journal: Path) -> None:
        from filelock import FileLock

        self._lock = FileLock(journal.with_suffix(".held"))

    def acquire(self) -> bool:
        """Wait until nobody else writes."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let others write."""
        self._lock.release()
