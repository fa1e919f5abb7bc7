"""How long a user waits from the command to the first image."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.conftest import Stated

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120.0


def seconds_to_first_image(command: list[str], out: Path, **environment: str) -> float:
    """Start a command, wait for its first image, then for its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=out.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not list(out.glob("images/*.png")):
            waited = time.perf_counter() - start
            if process.poll() is not None or waited > LONGEST:
                break
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert list(out.glob("images/*.png")), printed
    return seconds


def sample(device: str, out: Path) -> list[str]:
    return [
        *(str(ROOT / "sample.py"), "ckpt=digits", "num_images=1", "classes=[3]", "gallery.num=0"),
        *("cfg_scale=1.5", f"trainer.accelerator={device}", "trainer.devices=1", f"out={out}"),
    ]


def test_from_the_command_to_the_first_image(device: str, stated: Stated, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seconds = seconds_to_first_image(sample(device, out), out)
    stated("from the command to the first image, eager: seconds", seconds, LONGEST)


def test_with_compilation_in_it(device: str, stated: Stated, tmp_path: Path) -> None:
    """Nothing of an earlier compilation is at hand."""
    out = tmp_path / "run"
    caches = {
        name: str(tmp_path / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    }
    command = [*sample(device, out), "compile=true"]
    seconds = seconds_to_first_image(command, out, **caches)
    assert list((tmp_path / "TORCHINDUCTOR_CACHE_DIR").rglob("*.py")), "nothing was compiled"
    stated("from the command to the first image, compiled: seconds", seconds, LONGEST)
