"""Where these tests run, what they state, and a process as they found it.

They need a CUDA device; SAG_DIT_GPU_TESTS_ON=cpu runs the same bodies on the CPU, to try them out.
SAG_DIT_GPU_REPORT=FILE collects what was measured, one JSON object a line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

DEVICES = ("cuda", "cpu")

Stated = Callable[..., None]


@pytest.fixture(scope="session")
def device() -> str:
    """The device to test, "cuda" unless told otherwise."""
    name = os.environ.get("SAG_DIT_GPU_TESTS_ON", "cuda")
    if name not in DEVICES:
        raise ValueError(f"SAG_DIT_GPU_TESTS_ON={name}: expected one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; SAG_DIT_GPU_TESTS_ON=cpu runs it on the CPU")
    return name


@pytest.fixture
def stated() -> Stated:
    """Write a measured figure down, then hold it to its bound, if it has one."""

    def write(what: str, value: float, bound: float | None = None) -> None:
        line = json.dumps({"what": what, "value": float(f"{value:.4g}"), "bound": bound})
        print(line)
        if report := os.environ.get("SAG_DIT_GPU_REPORT"):
            with Path(report).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        assert bound is None or value <= bound, f"{what}: {value}, expected at most {bound}"

    return write


def _restore(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Take back what a training run sets for its whole process."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        _restore(environment)
