"""The device without float64, also as Lightning's accelerator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lightning.fabric.accelerators import MPSAccelerator as FabricMPS
from lightning.pytorch.accelerators import MPSAccelerator

from tests.mps.device import without_float64


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device, and ``trainer.accelerator=mps`` with it."""
    for accelerator in (MPSAccelerator, FabricMPS):
        monkeypatch.setattr(accelerator, "is_available", staticmethod(lambda: True))
    with without_float64() as device:
        yield device
