"""When a term acts, and how strongly: intervals and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from sag_dit.process import NoiseLevel, Process, Step

Unit = Literal["progress", "t", "sigma"]
Bound: TypeAlias = float | None
Ramp = Literal["constant", "linear", "cosine"]
RAMPS: tuple[str, ...] = get_args(Ramp)
Schedule: TypeAlias = Ramp | Callable[[float], float]


def bounds(interval: object, unit: Unit) -> tuple[Bound, Bound]:
    """Return an interval as two numbers, None being a side left open.

    Raises:
        ValueError: not two numbers, in the wrong order, or outside the run.
    """
    # The unit, and two bounds that are numbers or None.
    if unit not in get_args(Unit):
        raise ValueError(f"interval_in={unit!r}: expected one of {', '.join(get_args(Unit))}")
    try:
        first: float | None
        second: float | None
        first, second = interval  # type: ignore[misc]
        start = None if first is None else float(first)
        stop = None if second is None else float(second)
    except (TypeError, ValueError):
        names = "(start, stop)" if unit == "progress" else "(low, high)"
        raise ValueError(f"interval={interval!r}: expected two numbers, {names}") from None
    # Their order and range: progress runs from 0 to 1, t and sigma have no common range.
    if unit == "progress":
        start, stop = 0.0 if start is None else start, 1.0 if stop is None else stop
        if not 0 <= start <= stop <= 1:
            raise ValueError(
                f"interval={(start, stop)}: expected (start, stop) with "
                f"0 <= start <= stop <= 1, in progress from noise (0) to image (1)"
            )
    elif not (-math.inf if start is None else start) <= (math.inf if stop is None else stop):
        raise ValueError(
            f"interval={(start, stop)}: expected (low, high) with low <= high, in {unit}; None "
            f"(null) leaves a side open"
        )
    return start, stop


def check_times(interval: tuple[Bound, Bound], process: Process) -> None:
    """Refuse an interval in t whose bounds look like shares of the run, as progress has them.

    Raises:
        ValueError: it ends at t = 1 or before, and the times of the process are larger.
    """
    first, high = float(process.grid(1)[0].t), interval[1]
    if high is not None and high <= 1 < first:
        raise ValueError(
            f"interval={interval} in t: this model's times fall from {first:g}; expected bounds "
            f"among them, (low, high), or interval_in=progress for shares of the run"
        )


def ratio(level: NoiseLevel) -> float:
    """Return sigma / alpha, infinite at pure noise."""
    alpha = float(level.alpha)
    return math.inf if alpha == 0 else float(level.sigma) / alpha


def acts(interval: tuple[Bound, Bound], unit: Unit, step: Step) -> bool:
    """Whether a step lies in an interval; the bound on the side of noise is included."""
    first = -math.inf if interval[0] is None else interval[0]
    second = math.inf if interval[1] is None else interval[1]
    if unit == "progress":
        return first <= step.progress < second
    value = float(step.level.t) if unit == "t" else ratio(step.level)
    return first < value <= second


def weight_of(schedule: Schedule, progress: float) -> float:
    """Return a schedule's weight when ``progress`` of the run is done, in [0, 1)."""
    if callable(schedule):
        return float(schedule(progress))
    if schedule == "linear":
        return 2 * progress
    if schedule == "cosine":
        return 1 - math.cos(math.pi * progress)
    return 1.0
