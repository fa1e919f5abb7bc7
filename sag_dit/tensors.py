"""Shapes and broadcasting shared by the whole package.

Shape legend, used in every annotation and docstring:

    b  images in a batch          c  channels of an image or latent
    h w  height and width         n  tokens of a sequence
    d  width of a token           k  attention heads
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Images: TypeAlias = Float[Tensor, "b c h w"]
Labels: TypeAlias = Int[Tensor, "b"]
Saliency: TypeAlias = Float[Tensor, "b n"]
Mask: TypeAlias = Bool[Tensor, "b h w"]
Scalar: TypeAlias = float | Tensor
"""One number for a whole batch, or a tensor that broadcasts against its images."""


def per_image(values: Float[Tensor, "b"], images: Images) -> Tensor:
    """Reshape one value per image so that it broadcasts over the image's channels and pixels."""
    return values.reshape(-1, *(1,) * (images.ndim - 1))


QUEUED = {"cuda"}
"""Kinds of devices to which a copy is queued behind what they have still to do."""


def sent(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy of a CPU's tensor on a device, without waiting for the device."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, dtype or values.dtype, non_blocking=device.type in QUEUED)


def home_of_doubles(device: torch.device) -> torch.device:
    """Return where float64 is kept beside a device: there, or on the CPU, as MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
