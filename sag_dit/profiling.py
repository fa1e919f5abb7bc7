"""Where a run's time goes: parts of the code that tell how long they take while somebody asks."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Profile:
    """The seconds of each part, without those of the parts within it.

    ``beside`` holds those of other threads, which work while the first one goes on. ``settle``
    waits until the device has done what it was given, so that each part is told its own work.

    Example:
        >>> with profiling() as profile, part("network", rows=2):
        ...     pass
        >>> list(profile.seconds), profile.rows["network"]
        (['network'], 2)
    """

    settle: Callable[[], object] = lambda: None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    beside: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: Counter[str] = field(default_factory=Counter)
    total: float = 0.0

    def __post_init__(self) -> None:
        self._first = threading.get_ident()
        self._open = threading.local()

    @contextmanager
    def part(self, name: str, rows: int, label: str) -> Iterator[None]:
        """Time what is done within; ``label`` tells apart the networks' passes within it."""
        first = threading.get_ident() == self._first
        if first:
            self.settle()
        within: list[list[float]] = self._open.__dict__.setdefault("within", [])
        labels: list[str] = self._open.__dict__.setdefault("labels", [])
        if name == "network" and labels:
            name = f"{name}, {labels[-1]}"
        labels += [label] * bool(label)
        inner = [0.0]
        within.append(inner)
        start = time.perf_counter()
        try:
            yield
        finally:
            if first:
                self.settle()
            took = time.perf_counter() - start
            within.pop()
            if label:
                labels.pop()
            if within:
                within[-1][0] += took
            (self.seconds if first else self.beside)[name] += took - inner[0]
            self.rows[name] += rows


_running: list[Profile] = []


@contextmanager
def profiling(settle: Callable[[], object] = lambda: None) -> Iterator[Profile]:
    """Have all parts told to the profile that is given, until the end."""
    profile = Profile(settle)
    _running.append(profile)
    start = time.perf_counter()
    try:
        yield profile
    finally:
        settle()
        profile.total = time.perf_counter() - start
        _running.remove(profile)


def part(name: str, rows: int = 0, label: str = "") -> AbstractContextManager[None]:
    """Time a part of the code, if somebody is profiling.

    Example:
        >>> with part("decode"):
        ...     pass
    """
    return _running[-1].part(name, rows, label) if _running else nullcontext()


def each_timed(name: str, steps: Iterable[T]) -> Iterator[T]:
    """Yield what ``steps`` does, and time how it comes about.

    Example:
        >>> list(each_timed("sampler", [1, 2]))
        [1, 2]
    """
    waiting = iter(steps)
    while True:
        with part(name):
            try:
                step = next(waiting)
            except StopIteration:
                return
        yield step
