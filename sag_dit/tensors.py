"""Shapes and broadcasting shared by the whole package.

Shape legend, used in every annotation and docstring:

    b  images in a batch          c  channels of an image or latent
    h w  height and width         n  tokens of a sequence
    d  width of a token           k  attention heads
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

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


def without_memory(module: Module, *shared: object) -> Module:
    """Return a copy of a module on the device ``meta``, made without memory for its tensors.

    ``shared`` are things in it that are not copied. No gradient reaches the module itself.

    Example:
        >>> without_memory(nn.Linear(8, 8)).weight.device
        device(type='meta')
    """
    memo: dict[int, object] = {id(each): each for each in shared}
    for tensor in (*module.parameters(), *module.buffers()):
        bare = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, bare.requires_grad) if is_parameter else bare
    return deepcopy(module, memo)
