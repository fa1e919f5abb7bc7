"""How near two results are, and how near they must be."""

from __future__ import annotations

import torch
from torch import Tensor


def error(ours: Tensor, golden: Tensor) -> float:
    """How far ours is from a golden, relative to it; infinite if shapes differ or it is not finite.

    Float64 tables and masks are compared number by number. A float32 result is compared as a whole,
    ||ours - golden|| / ||golden||, or by a twentieth of its largest single difference over the
    golden's root mean square, if that is more: where x_0 is clamped at the noisy end, the few
    numbers within the bounds carry the rounding of x_t / alpha, which differs between processors.
    The states of a trajectory grow, so each is measured by its own size.
    """
    if ours.shape != golden.shape or not ours.isfinite().all():
        return float("inf")
    ours = ours.double()
    if golden.dtype != torch.float32:
        golden = golden.double()
        return float(((ours - golden).abs() / golden.abs().clamp(min=1e-30)).max())
    rows = len(golden) if golden.ndim == 5 else 1
    golden = golden.double().reshape(rows, -1)
    difference = ours.reshape(rows, -1) - golden
    size = golden.square().mean(dim=1).sqrt()
    whole = difference.square().mean(dim=1).sqrt() / size
    worst = difference.abs().amax(dim=1) / size
    return float(torch.maximum(whole, worst / 20).max())


def tolerance(golden: Tensor) -> float:
    """The largest error that parity allows: 1e-5 in float32, 1e-8 for tables in float64.

    The original multiplies the respaced 1 - beta anew, which costs it digits of the smallest alpha.
    """
    return 1e-5 if golden.dtype == torch.float32 else 1e-8


def disagreements(
    outputs: dict[str, Tensor], goldens: dict[str, Tensor], factor: float = 1.0
) -> dict[str, float]:
    """Errors of more than `factor` times the tolerance, by key."""
    errors = {key: error(value, goldens[key]) for key, value in outputs.items()}
    return {key: e for key, e in errors.items() if not e <= factor * tolerance(goldens[key])}
