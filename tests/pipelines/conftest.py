"""One tiny pipeline of each family, built once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.pipelines import tiny


@cache
def built(family: str) -> Any:
    pipe = tiny.BUILD[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=list(tiny.BUILD))
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family; tests that take it run for each."""
    return str(request.param)


@pytest.fixture
def pipe(family: str) -> Any:
    """The pipeline of that family."""
    return built(family)
