"""What a card can do at most, for the share of it that a run uses (MFU)."""

from __future__ import annotations

import re

import torch

PEAKS = {
    "H100 80GB HBM3": (66.9, 494.7, 989.4),
    "H100 PCIe": (51.2, 378.0, 756.0),
    "H200": (66.9, 494.7, 989.4),
    "A100": (19.5, 156.0, 312.0),
    "L40S": (91.6, 183.0, 362.0),
    "L4": (30.3, 60.0, 121.0),
}
"""Dense TFLOP/s of float32, TF32 and bf16 or fp16 by a part of the card's name.

Lightning's own table has twice as much for some cards: NVIDIA prints figures of sparse matrices.

Source: NVIDIA's data sheets.
"""


def peak_of(card: str, precision: str, tf32: bool) -> float | None:
    """Return a card's FLOP/s at a Trainer's precision; None where it is not known.

    Example:
        >>> peak_of("NVIDIA L40S", "bf16-mixed", tf32=False)
        362000000000000.0
    """
    column = 2 if "16" in precision else 1 if tf32 else 0
    known = [peaks[column] for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", card)]
    return known[0] * 1e12 if known else None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s of a device as float32 products are set now; None where not known."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of(torch.cuda.get_device_name(device), precision, tf32)
