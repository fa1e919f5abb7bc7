"""One tiny pipeline of each family, built once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.pipelines import tiny


@cache
def built(family: str) -> Any:
    # Whoever asks first has the same generator afterwards as whoever asks later.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = tiny.BUILD[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def seeded() -> None:
    """SAG's mask is a threshold: weights that differ from run to run meet it now and then."""
    torch.manual_seed(0)


# SDXL is of Stable Diffusion's layout; the examples of the documents are fast tests of it too.
FAMILIES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "sdxl" else name for name in tiny.BUILD
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family; tests that take it run for each."""
    return str(request.param)


@pytest.fixture
def pipe(family: str) -> Any:
    """The pipeline of that family."""
    return built(family)
