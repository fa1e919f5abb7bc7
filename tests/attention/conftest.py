"""Fixtures of the tests of attention."""

from __future__ import annotations

import pytest
import torch

from tests.attention.looking import Inputs


@pytest.fixture
def inputs() -> Inputs:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([900, 500, 100, 0]), torch.tensor([1, 2, 3, 10])
