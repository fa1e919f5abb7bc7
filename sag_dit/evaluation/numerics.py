"""Full float32 for features: no autocast, no TF32 or bfloat16 within products, no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the tensors, whatever a trainer has set.

    cuDNN rounds the inputs of a float32 convolution to ten bits unless told otherwise, which
    changes features by a thousandth.
    """
    before = [backend.fp32_precision for backend in BACKENDS]
    try:
        for backend in BACKENDS:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(BACKENDS, before, strict=True):
            backend.fp32_precision = precision
