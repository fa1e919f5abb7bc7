"""Two machines give what one gives, and a machine that is lost ends the run by its name.

The machines are two network namespaces with a cable between them: each has a network of its own, so
that nothing works only because both are this one. They share the disk, as nodes of a cluster do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PORTS = count(29_600)
NETWORK = "10.77.0"
SMALL = ("model.hidden_size=16", "model.depth=2", "model.num_heads=2")
TRAINED = ("max_steps=4", "data.batch_size=8", "logger=none", "every_n_steps.checkpoint=2", *SMALL)

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False)


@dataclass(frozen=True)
class Nodes:
    """Two machines by the names of their network namespaces, and of their ends of the cable."""

    names: tuple[str, str]
    cable: tuple[str, str]

    def start(self, port: int, *arguments: str) -> list[subprocess.Popen[str]]:
        """Start a command on both by torchrun, a process each."""
        torchrun = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(f"--master-addr={NETWORK}.1", f"--master-port={port}"),
        )
        both = ("trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1")
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *torchrun, f"--node-rank={rank}", *arguments, *both],
                cwd=ROOT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank, (name, cable) in enumerate(zip(self.names, self.cable, strict=True))
        ]

    def run(self, *arguments: str) -> None:
        """Run a command on both, to its end."""
        processes = self.start(next(PORTS), *arguments)
        told = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told

    def lose(self, which: int, number: int = signal.SIGKILL) -> None:
        """Kill all that runs on one of them, at once; or stop it, as a loss of power does."""
        for process in ip("netns", "pids", self.names[which]).stdout.split():
            os.kill(int(process), number)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("two machines are made of network namespaces, which take ip and root")
    names = (f"sag{os.getpid()}a", f"sag{os.getpid()}b")
    cable = (f"v{os.getpid()}a", f"v{os.getpid()}b")
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.decode().strip()}")
        ends = ["netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1]]
        if (made := ip("link", "add", cable[0], *ends)).returncode:
            pytest.skip(f"no virtual cables here: {made.stderr.decode().strip()}")
        for rank, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{rank}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield Nodes(names, cable)
    finally:
        for name in names:
            ip("netns", "del", name)


def run_here(*arguments: str) -> None:
    """Run the same on one machine, with as many processes."""
    one = ("trainer.accelerator=cpu", "trainer.devices=2")
    done = subprocess.run(
        [sys.executable, *arguments, *one],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def images(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "images").glob("*.png")
    }


def test_a_set_is_that_of_one_machine(nodes: Nodes, tmp_path: Path) -> None:
    command = ("sample.py", "ckpt=digits", "num_images=9", "batch_size=2", "steps=4")
    nodes.run(*command, f"out={tmp_path}/two")
    run_here(*command, f"out={tmp_path}/one")
    assert len(images(tmp_path / "two")) == 9
    assert images(tmp_path / "two") == images(tmp_path / "one")
    lines = [(tmp_path / each / "manifest.jsonl").read_text() for each in ("one", "two")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_trained_weights_are_those_of_one_machine(
    nodes: Nodes, tmp_path: Path, strategy: str
) -> None:
    command = ("train.py", "experiment=digits", f"trainer={strategy}", *TRAINED)
    nodes.run(*command, f"out={tmp_path}/two")
    run_here(*command, f"out={tmp_path}/one")
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("one", "two")]
    assert weights[0] == weights[1]


def test_numbers_are_those_of_one_machine(nodes: Nodes, tmp_path: Path) -> None:
    command = ("evaluate.py", "ckpt=digits", "num_images=16", "steps=3", "batch_size=4")
    for name, run in (("two", nodes.run), ("one", run_here)):
        run(*command, f"out={tmp_path}/{name}", f"finished={tmp_path}/finished-{name}")
    two, one = (
        json.loads((tmp_path / each / "results.json").read_text())["results"][0]["metrics"]
        for each in ("two", "one")
    )
    assert two == one


@pytest.mark.long
def test_a_lost_machine_ends_sampling_by_its_name_and_the_set_is_completed(
    nodes: Nodes, tmp_path: Path
) -> None:
    command = ("sample.py", "ckpt=digits", "num_images=120", "batch_size=2", "steps=50")
    out = f"out={tmp_path}/two"
    processes = nodes.start(next(PORTS), *command, out)
    deadline = time.monotonic() + 120
    while not (tmp_path / "two" / "images" / "000021.png").exists():
        assert time.monotonic() < deadline
        assert processes[0].poll() is None
        time.sleep(0.05)
    nodes.lose(1)
    told, _ = processes[0].communicate(timeout=240)
    processes[1].communicate()
    # Within a minute of its own last image: it draws its share first.
    assert processes[0].returncode == 1
    assert "error: rank 1 on " in told
    assert "is lost: no heartbeat for 45 s" in told
    assert "repeat the command to go on" in told
    there = set(images(tmp_path / "two"))
    assert 60 <= len(there) < 120
    nodes.run(*command, out)
    assert len(images(tmp_path / "two")) == 120


@pytest.mark.long
def test_a_machine_without_power_ends_training_by_its_name_and_the_run_goes_on(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Its connections stay open, so that nothing but its silence tells."""
    steps = ("max_steps=500", "every_n_steps.checkpoint=50")
    command = ("train.py", "experiment=digits", *TRAINED, *steps)
    processes = nodes.start(next(PORTS), *command, f"out={tmp_path}/two")
    deadline = time.monotonic() + 240
    while not list((tmp_path / "two" / "checkpoints").glob("*.ckpt")):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None
        time.sleep(0.05)
    nodes.lose(1, signal.SIGSTOP)
    begun = time.monotonic()
    told, _ = processes[0].communicate(timeout=240)
    nodes.lose(1)
    processes[1].communicate()
    assert processes[0].returncode == 1
    assert "error: rank 1 on " in told
    assert "is lost: no heartbeat for 45 s" in told
    assert "repeat the command to go on" in told
    assert time.monotonic() - begun < 100
    nodes.run(*command, f"out={tmp_path}/two")
    run_here(*command, f"out={tmp_path}/one")
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("one", "two")]
    assert weights[0] == weights[1]
