"""A training run that is killed or told to stop goes on to the same weights, bit for bit."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 40
SMALL = (
    "experiment=digits",
    "model.hidden_size=48",
    "model.depth=2",
    "model.num_heads=3",
    "data.batch_size=16",
    "every_n_steps.checkpoint=4",
    "every_n_steps.log=5",
    "every_n_steps.validation=20",
    "every_n_steps.preview=1000",
    f"max_steps={STEPS}",
)


def start(out: Path, *arguments: str, settings: Sequence[str] = SMALL) -> subprocess.Popen[str]:
    """Start ``train.py`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings, f"out={out}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.ckpt"))


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path, beyond: int) -> None:
    """Wait until a checkpoint newer than step ``beyond`` is there, or the run has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.stem.split("-")[1]) > beyond for path in checkpoints(out)):
            return
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    # It may have ended by itself in this moment.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill it after so long; whether it had not ended before."""
    time.sleep(seconds)
    if process.poll() is None:
        kill(process)
        return True
    process.communicate()
    return False


def finish(out: Path, *arguments: str, settings: Sequence[str] = SMALL) -> str:
    process = start(out, *arguments, settings=settings)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The exported average, and the raw weights and optimiser state of the last checkpoint."""
    last = torch.load(checkpoints(out)[-1], weights_only=True)
    assert last["global_step"] == STEPS
    optimiser = last["optimizer_states"][0]["state"]
    return {
        **load_file(out / "model.safetensors"),
        **{f"raw.{name}": tensor for name, tensor in last["state_dict"].items()},
        **{
            f"adam.{i}.{name}": value
            for i, each in optimiser.items()
            for name, value in each.items()
        },
    }


def logged(out: Path) -> list[dict[str, str]]:
    """The rows of the run's one log, but for what is measured of time and memory."""
    with (out / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {"images/s", "memory_gb", "mfu"}
    return [{key: row[key] for key in row.keys() - measured} for row in rows]


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.slow
def test_killed_told_to_stop_and_truncated(tmp_path: Path) -> None:
    """SIGKILL, SIGTERM, then a truncated newest checkpoint: the same weights, and the same log."""
    out = tmp_path / "run"
    process = start(out)
    wait_for_checkpoint(process, out, beyond=0)
    kill(process)
    assert checkpoints(out)

    process = start(out)
    before = int(checkpoints(out)[-1].stem.split("-")[1])
    wait_for_checkpoint(process, out, beyond=before)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    assert "Traceback" not in printed

    newest = checkpoints(out)[-1]
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    printed = finish(out)
    assert f"{newest} cannot be read" in printed
    finish(tmp_path / "whole")
    assert_bit_equal(weights(out), weights(tmp_path / "whole"))
    assert logged(out) == logged(tmp_path / "whole")
    # Nothing is left of what SIGTERM or a kill in the middle of saving wrote besides.
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best-00000040.ckpt", "step-00000036.ckpt", "step-00000040.ckpt"]


def photos(tmp_path: Path) -> tuple[str, ...]:
    """Images as files, since loader processes serve those, and the arguments that take them."""
    for index in range(24):
        photo = tmp_path / "photos" / str(index % 2) / f"{index}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index * 10, 255 - index * 10, 0)).save(photo)
    root = f"data.root={tmp_path / 'photos'}"
    small = ("data.size=8", "data.batch_size=8", "data.held_out=0.2", "trainer.accelerator=cpu")
    return ("data=folder", root, *small)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_all_processes_are_told_to_stop(
    tmp_path: Path, ranks: int, number: signal.Signals, code: int
) -> None:
    """As Ctrl-C and schedulers do: ranks, and the processes that read, are told as well."""
    rarely = ("every_n_steps.checkpoint=1000000", "max_steps=1000000", "every_n_steps.log=1")
    devices = (f"trainer.devices={ranks}", "data.workers=2")
    process = start(tmp_path / "run", *photos(tmp_path), *rarely, *devices)
    deadline = time.monotonic() + 120
    log = tmp_path / "run" / "logs" / "metrics.csv"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) > 5:
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert "Traceback" not in printed and "error" not in printed
    (saved,) = checkpoints(tmp_path / "run")
    step = int(saved.stem.split("-")[1])
    assert printed.count(f"stopped: saved at step {step}; repeat the command to go on") == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 6)])
@pytest.mark.parametrize("workers", [0, 2])
def test_many_kills_at_random_moments(tmp_path: Path, ranks: int, kills: int, workers: int) -> None:
    """While starting, training and saving; a run that ends before it is killed begins anew."""
    arguments = (*photos(tmp_path), f"data.workers={workers}", f"trainer.devices={ranks}")
    finish(tmp_path / "whole", *arguments)
    whole = weights(tmp_path / "whole")
    chance, killed, runs = random.Random(workers), 0, 0
    while killed < kills:
        out = tmp_path / f"run{runs}"
        process = start(out, *arguments)
        seen = checkpoints(out)
        # Some die while they start, the others within a second of a new checkpoint.
        if chance.random() < 0.7:
            wait_for_checkpoint(process, out, int(seen[-1].stem.split("-")[1]) if seen else 0)
        if killed_within(process, chance.uniform(0, 0.5)):
            killed += 1
        else:
            runs += 1
    finish(out, *arguments)
    assert_bit_equal(weights(out), whole)


BROKEN = """
    import os
    from dataclasses import replace

    from sag_dit.training.objective import MSE

    class Broken(MSE):
        calls = 0

        def losses(self, *arguments):
            losses = super().losses(*arguments)
            Broken.calls += 1
            if os.environ.get("LOCAL_RANK") == "1" and Broken.calls == 3:
                return replace(losses, per_image=losses.per_image * float("nan"))
            return losses
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_ranks_skip_a_step_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    """The third loss is not a number on one of two ranks; mixed precision and clipping besides."""
    (tmp_path / "broken.py").write_text(textwrap.dedent(BROKEN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ranked = ("trainer.devices=2", "trainer.accelerator=cpu", f"trainer={trainer}", "max_steps=4")
    options = ("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "every_n_steps.log=1")
    finish(tmp_path / "run", *ranked, *options, "objective._target_=broken.Broken")
    rows = logged(tmp_path / "run")
    assert [row["train/skipped"] for row in rows] == ["", "", "1.0", "1.0"]
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())


@pytest.mark.slow
def test_sharded_and_copied_models_train_to_the_same_weights(tmp_path: Path) -> None:
    """FSDP2 on two ranks, stopped once, against DDP: were ranks not averaged, they would differ."""
    ranked = ("trainer.devices=2", "trainer.accelerator=cpu", "max_steps=8")
    finish(tmp_path / "ddp", *ranked, "trainer=ddp")
    finish(tmp_path / "fsdp", *ranked, "trainer=fsdp", "max_steps=4")
    finish(tmp_path / "fsdp", *ranked, "trainer=fsdp")
    copied = load_file(tmp_path / "ddp" / "model.safetensors")
    assert_bit_equal(load_file(tmp_path / "fsdp" / "model.safetensors"), copied)


@pytest.mark.slow
def test_three_ranks_that_stop_go_on_to_the_same_weights(tmp_path: Path) -> None:
    """With three ranks it matters in which order gradients are added; with two it does not."""
    ranked = ("trainer.devices=3", "trainer.accelerator=cpu", "data.batch_size=12")
    finish(tmp_path / "whole", *ranked, "max_steps=8")
    finish(tmp_path / "stopped", *ranked, "max_steps=4")
    finish(tmp_path / "stopped", *ranked, "max_steps=8")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert_bit_equal(load_file(tmp_path / "stopped" / "model.safetensors"), whole)
