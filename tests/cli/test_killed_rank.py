"""A rank that is killed is named, with its signal and what to do; no other goes on without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROOT
from tests.cli.test_orphans import alive, ranks_of, wait_for

Start = Callable[..., Any]

WATCHING = """
    import os, signal, subprocess, sys, time

    from sag_dit.cli import stopping

    stopping.GRACE = 0.5
    code = ["import time; time.sleep(60)", sys.argv[1]]
    ranks = [subprocess.Popen([sys.executable, "-c", each]) for each in code]
    print(ranks[0].pid, flush=True)
    stopping.watch_ranks(ranks)
    if sys.argv[2] == "ends":
        stopping._end(ranks)
        time.sleep(1)
        print("alone", flush=True)
        sys.exit(0)
    time.sleep(60)
"""


def watch(second: str, how: str = "waits") -> tuple[int, str, str, int]:
    """Watch two ranks, of which the second runs this code; return how it ended, and the first."""
    program = [sys.executable, "-c", textwrap.dedent(WATCHING), second, how]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    return done.returncode, done.stdout, done.stderr, int(done.stdout.splitlines()[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_signal_is_named_and_the_others_end(number: signal.Signals) -> None:
    code, _, err, first = watch(f"import os; os.kill(os.getpid(), {int(number)})")
    assert code == 1
    assert f"error: rank 2 was killed by signal {int(number)} ({number.name}), often for" in err
    assert "repeat the command to complete" in err
    assert wait_for(lambda: not alive(first), 5)


def test_one_that_fails_is_given_up_after_a_while() -> None:
    code, _, err, first = watch("raise SystemExit(3)")
    assert code == 1
    assert "error: rank 2 failed; what is written is kept" in err
    assert wait_for(lambda: not alive(first), 5)


def test_those_that_are_ended_are_not_mourned() -> None:
    code, out, err, _ = watch("import time; time.sleep(60)", "ends")
    assert (code, out.splitlines()[1], err) == (0, "alone", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by ps")
@pytest.mark.parametrize("script", ["sample.py", "train.py"])
def test_a_killed_rank_ends_the_command(start: Start, tmp_path: Path, script: str) -> None:
    two = ("trainer.accelerator=cpu", "trainer.devices=2", f"out={tmp_path / 'run'}")
    if script == "sample.py":
        begun = tmp_path / "run" / "images" / "000005.png"
        command = ("ckpt=digits", "num_images=4000", "batch_size=4", "steps=50", *two)
    else:
        small = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3")
        often = ("every_n_steps.checkpoint=2", "max_steps=1000000")
        begun = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
        command = ("experiment=digits", "data.batch_size=16", *small, *often, *two)
    process = start(*command, script=script)
    try:
        assert wait_for(begun.exists, 120)
        (rank,) = ranks_of(process.pid, script)
        os.kill(rank, signal.SIGKILL)
        since = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - since < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, err
    assert err.count("error: rank 1 was killed by signal 9 (SIGKILL), often for want of") == 1
    assert "Traceback" not in err
