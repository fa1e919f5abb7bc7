"""Timing by turns, peak memory and FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]


def randomise(network: nn.Module) -> None:
    """Give every weight a small random value, but not the positions, so that none is zero."""
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.02)


def synchronised() -> float:
    """Return the time in seconds, once the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Work) -> float:
    """Time one call; on a GPU until its queue is empty."""
    start = synchronised()
    work()
    return synchronised() - start


def median_seconds(work: Work, rounds: int) -> float:
    """Return the median time of a call, after two calls that warm up."""
    work()
    work()
    return statistics.median(seconds(work) for _ in range(rounds))


def ratio(work: Work, base: Work, rounds: int) -> tuple[float, float, float]:
    """Return the median of time(work) / time(base) over rounds, and its quartiles.

    Each round times both, one right after the other, in turned order, so that what else the
    machine does meets both alike.
    """
    work()
    base()
    ratios = []
    for i in range(rounds):
        if i % 2:
            first, second = seconds(work), seconds(base)
        else:
            second, first = seconds(base), seconds(work)
        ratios.append(first / second)
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def peak_memory(work: Work) -> int:
    """Return the most bytes of tensors alive at once beyond those alive before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # Allocations are in the raw trace only.
    trace = profiler.profiler.kineto_results.events()
    changes = [event for event in trace if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def flops(work: Work) -> int:
    """Count the floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
