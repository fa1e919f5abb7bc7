"""The Gaussian blur of SAG, blur guidance and SEG: torchvision's, bit for bit, without its import.

Importing torchvision takes longer than importing torch. A test holds the two equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sag_dit.tensors import Images


def gaussian_blur(images: Images, kernel_size: int, sigma: float) -> Images:
    """Return images (b, c, h, w) convolved with a Gaussian, reflected at their borders.

    The kernel holds exp(-(i^2 + j^2) / (2 sigma^2)) for |i|, |j| <= ``kernel_size`` // 2, divided
    by its sum. ``kernel_size`` is odd; half of it is less than either side.

    Source: torchvision, transforms/v2/functional.

    Example:
        >>> gaussian_blur(torch.ones(1, 4, 8, 8), kernel_size=9, sigma=1.0).shape
        torch.Size([1, 4, 8, 8])
    """
    half, channels = kernel_size // 2, images.shape[1]
    limit = (kernel_size - 1) / (2 * math.sqrt(2))
    x = torch.linspace(-limit, limit, kernel_size, dtype=images.dtype, device=images.device)
    row = torch.softmax(x.div(sigma).pow(2).neg(), dim=0)
    kernel: Tensor = row[:, None] * row
    padded = F.pad(images, [half] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)
