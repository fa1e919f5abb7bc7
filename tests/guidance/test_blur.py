"""The Gaussian blur is torchvision's, to the bit."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur as torchvisions

from sag_dit.guidance.blur import gaussian_blur


@pytest.mark.parametrize("shape", [(2, 4, 16, 12), (1, 3, 9, 9), (3, 1, 5, 40)])
@pytest.mark.parametrize(("kernel", "sigma"), [(1, 1.0), (3, 0.4), (9, 1.0), (5, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_blur_is_torchvisions(
    shape: tuple[int, ...], kernel: int, sigma: float, dtype: torch.dtype
) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torchvisions(images, [kernel, kernel], [sigma, sigma])
    blurred = gaussian_blur(images, kernel, sigma)
    assert blurred.dtype == dtype
    assert torch.equal(blurred, expected)
