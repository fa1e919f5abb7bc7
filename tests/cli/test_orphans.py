"""No rank outlives the process that has started it, whenever that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.cli.conftest import ROOT

Found = TypeVar("Found")

DRAWING = ("ckpt=digits", "num_images=4000", "batch_size=4", "steps=50")
TWO_RANKS = ("trainer.accelerator=cpu", "trainer.devices=2")


def ranks_of(pid: int, script: str = "sample.py") -> list[int]:
    """The ranks that a process has started, zombies left out; other programs come and go."""
    listed = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid=,stat=,args="],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [int(row[0]) for row in rows if row[1][0] != "Z" and script in row[2]]


def alive(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_for(found: Callable[[], Found], seconds: float) -> Found:
    """Ask until there is something, and return it; in the end what there is then."""
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ranks watch their parent by prctl on Linux")
@pytest.mark.parametrize("moment", ["as soon as a rank is there", "while both draw"])
def test_a_rank_ends_with_rank_0(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), *DRAWING, *TWO_RANKS, f"out={tmp_path}/two"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        ranks = wait_for(lambda: ranks_of(process.pid), 120)
        assert ranks
        if moment == "while both draw":
            images = tmp_path / "two" / "images"
            assert wait_for(lambda: len(list(images.glob("*.png"))) > 12, 120)
        process.kill()
        process.wait()
        # A rank that was only being started ends when it gets to our first line.
        assert wait_for(lambda: not any(map(alive, ranks)), 15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


STARTED = """
import os, sys, time
sys.path.insert(0, {root!r})
from sag_dit.cli.orphans import end_with_parent
end_with_parent()
print("alive", flush=True)
"""


def started(**environment: str) -> subprocess.CompletedProcess[str]:
    """Start a process that asks to end with its parent, and let it end by itself."""
    return subprocess.run(
        [sys.executable, "-c", STARTED.format(root=str(ROOT))],
        env={**{k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_parent_that_has_ended_before_is_noticed() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = started(SAG_DIT_PARENT=str(ended.pid), LOCAL_RANK="1")
    assert gone.returncode == 1
    assert gone.stdout == ""


@pytest.mark.parametrize(
    "environment",
    [
        {},  # started by hand
        {"LOCAL_RANK": "0"},  # by torchrun
        {"SAG_DIT_PARENT": "1", "LOCAL_RANK": "0"},  # by torchrun, within a process of ours
        {"SAG_DIT_PARENT": str(os.getpid()), "LOCAL_RANK": "1"},  # by Lightning
    ],
)
def test_others_live(environment: dict[str, str]) -> None:
    done = started(**environment)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
