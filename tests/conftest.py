"""Fixtures shared by all tests: tiny models that attend unevenly, and a repeatable hypothesis.

The process of pytest-xdist that runs no test reads this file too: torch is imported when needed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from sag_dit.denoiser import ClassConditional
    from sag_dit.models import DiT

MakeDiT = Callable[..., "DiT"]

# Tiny tensors run faster on one thread. Set before torch and numpy read it, and inherited by the
# commands that tests start; OMP_NUM_THREADS=2 make test shows that nothing depends on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# make hands its own arguments to every program below it: `make test ARGS="-m gpu"` would set ARGS
# for a make that a test starts.
for _name in ("ARGS", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(_name, None)

# A test run may forbid wide instructions to torch. oneDNN reads another name; where only one of the
# two knows of it, attention in bfloat16 fails on processors with AMX ("pack_vnni2 ...").
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# The same examples on every machine; no database, so no folder is left behind.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share folders of tests between the cores; run what is named more closely in this process.

    Each process first imports for some ten seconds and takes 1.5 GB: four at most.
    """
    folders = any(Path(each).is_dir() for each in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4) if folders else 0


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Give torch as many threads as the commands that tests start."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """References that tests make do not end in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAG_DIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_dit() -> MakeDiT:
    """Build a tiny DiT none of whose weights is zero, so that every part of it matters."""
    from tests import small

    return small.dit


@pytest.fixture
def tiny_dit(make_dit: MakeDiT) -> DiT:
    """8x8 latents of 4 channels in 4x4 tokens, 3 blocks, 10 classes, learned variance."""
    return make_dit()


@pytest.fixture
def wide_dit(make_dit: MakeDiT) -> DiT:
    """A rectangular grid, 8x12 pixels in 4x6 tokens."""
    return make_dit(input_size=(8, 12))


@pytest.fixture
def denoiser(tiny_dit: DiT) -> ClassConditional:
    """The tiny DiT as a denoiser of the linear process."""
    from tests import small

    return small.denoiser(tiny_dit)


@pytest.fixture
def wide_denoiser(wide_dit: DiT) -> ClassConditional:
    """The rectangular DiT as a denoiser of the linear process."""
    from tests import small

    return small.denoiser(wide_dit)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, that of the system or playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = filter(None, map(shutil.which, BROWSERS))
        program = next(found, driver.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        opened = driver.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()
