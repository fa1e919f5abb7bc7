"""Telling a profile: each part's share of the time, and how much of the device the network used."""

from __future__ import annotations

import torch

from sag_dit.checkpoints import Model
from sag_dit.denoiser import ClassConditional
from sag_dit.profiling import Profile
from sag_dit.training.callbacks import forward_flops
from sag_dit.training.peaks import peak_flops


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(model: Model, alone: bool) -> int | None:
    """Return a pass's operations for one row, None where they cannot be counted.

    ``alone`` says that no other network is asked beside the model's own, whose rows count as well.
    """
    countable = alone and isinstance(model.denoiser, ClassConditional)
    return forward_flops(model) if countable else None


def told(
    profile: Profile, flops: int | None, device: torch.device, precision: str = "32-true"
) -> list[str]:
    """Return a profile in lines: the parts of the first thread, and what went on beside it."""
    lines = [f"where {profile.total:.2f} s went:"]
    rest = profile.total - sum(profile.seconds.values())
    shares = sorted(profile.seconds.items(), key=lambda each: -each[1])
    for name, seconds in [*shares, ("everything else", rest)]:
        share = 100 * seconds / profile.total
        lines.append(f"  {name:<18} {seconds:8.2f} s  {share:3.0f} %")
    if profile.beside:
        beside = ", ".join(f"{name} {s:.2f} s" for name, s in profile.beside.items())
        lines.append(f"  beside that, on another thread: {beside}")
    # How much of the device the passes used, from the operations that were counted.
    passes = [name for name in profile.seconds if name.startswith("network")]
    # Where a cache continues the blocks, hardly any operation is left.
    passes = [name for name in passes if not name.endswith("continued")]
    rows = sum(profile.rows[name] for name in passes)
    took = sum(profile.seconds[name] for name in passes)
    if flops and took:
        rate = flops * rows / took
        text = f"  network: {rows} rows of {flops / 1e9:.3g} GFLOPs, {rate / 1e12:.3g} TFLOP/s"
        peak = peak_flops(device, precision)
        text += f", {rate / peak:.0%} of what the card can do (MFU)" if peak else ""
        lines.append(text)
    return lines
