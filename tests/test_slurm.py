"""Under SLURM, whose variables are set by hand: two tasks do what two devices do here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("model.hidden_size=16", "model.depth=2", "model.num_heads=2", "data.batch_size=8")
EVERY = ("every_n_steps.checkpoint=1000", "every_n_steps.log=1")
TRAIN = ("train.py", "experiment=digits", "logger=csv", "max_steps=300", *EVERY, *SMALL)

pytestmark = pytest.mark.slow


def tasks(number: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start the two tasks of one job on this machine, as ``srun`` does."""
    job = {"SLURM_JOB_ID": f"{24_000 + os.getpid() % 1_000 + number}", "SLURM_JOB_NAME": "sag"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    where = ("trainer.accelerator=cpu", "trainer.devices=2")
    return [
        subprocess.Popen(
            [sys.executable, *arguments, *where],
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if "SLURM" not in name},
                **job,
                **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]], code: int) -> list[str]:
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], told
    return told


def here(*arguments: str) -> None:
    command = [sys.executable, *arguments, "trainer.accelerator=cpu", "trainer.devices=2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


def test_a_set_is_drawn_once_by_all_tasks(tmp_path: Path) -> None:
    command = ("sample.py", "ckpt=digits", "num_images=5", "batch_size=2", "steps=3")
    first, second = ended(tasks(0, *command, f"out={tmp_path}/job"), 0)
    assert "gallery: " in first and "gallery: " not in second
    here(*command, f"out={tmp_path}/here")
    job, alone = (sorted((tmp_path / name / "images").iterdir()) for name in ("job", "here"))
    assert [file.read_bytes() for file in job] == [file.read_bytes() for file in alone]
    assert len(job) == 5


def test_a_job_that_is_told_to_end_goes_on_when_it_is_put_into_the_queue_again(
    tmp_path: Path,
) -> None:
    command = (*TRAIN, f"out={tmp_path}/job")
    processes = tasks(1, *command)
    deadline = time.monotonic() + 200
    log = tmp_path / "job" / "logs" / "metrics.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ended(processes, 143)
    assert list((tmp_path / "job" / "checkpoints").glob("*.ckpt"))
    ended(tasks(2, *command), 0)
    here(*TRAIN, f"out={tmp_path}/here")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("job", "here")]
    assert weights[0] == weights[1]
