"""Several processes draw what one draws, also after one has failed or all have been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]

TWO_RANKS = ("trainer.accelerator=cpu", "trainer.devices=2")


def load_all(folder: Path) -> list[str]:
    """Decode every image of a folder completely, and name them."""
    files = sorted(folder.glob("*.png"))
    for file in files:
        with Image.open(file) as image:
            image.load()
    return [file.name for file in files]


def results(contents: Contents, folder: Path) -> dict[str, str]:
    """All files but the one that names the folder."""
    return {name: sha for name, sha in contents(folder).items() if name != "config.yaml"}


def killed_with(process: Any, images: Path, count: int) -> None:
    """Kill a command and its ranks once so many images are written."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if images.exists() and len(list(images.glob("*.png"))) >= count:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, out + err


@pytest.mark.slow
def test_killed_half_way_and_repeated_is_the_same_set(
    sample: Command,
    start: Command,
    in_other_process: Command,
    contents: Contents,
    tiny: Path,
    tmp_path: Path,
) -> None:
    arguments = (
        *(f"ckpt={tiny}", "sag_scale=1.0", "cfg_scale=1.5", "steps=20", "batch_size=2"),
        *("num_images=32", "gallery.num=3", "npz=true"),
    )
    command = (*arguments, *TWO_RANKS, "out=two")
    images = tmp_path / "two" / "images"

    killed_with(start(*command), images, 10)
    written = load_all(images)
    assert 10 <= len(written) < 32
    drawn_at = {name: (images / name).stat().st_mtime_ns for name in written}

    again = in_other_process(*command)
    assert again.code == 0, again.err
    assert len(load_all(images)) == 32
    # What was there was not drawn again.
    assert {name: (images / name).stat().st_mtime_ns for name in written} == drawn_at
    assert not (tmp_path / "two" / "ranks").exists()
    single = sample(*arguments, "out=one").folder()
    two = {
        name: sha for name, sha in results(contents, tmp_path / "two").items() if "tmp" not in name
    }
    assert two == results(contents, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        ("search=best_of", "search.num=3"),
        ("search=fk", "search.particles=2", "search.every=3", "sampler=ddpm"),
    ],
    ids=["best_of", "fk"],
)
def test_a_search_that_two_ranks_made_and_a_kill_ended_chooses_the_same(
    search: tuple[str, ...],
    in_process: Command,
    start: Command,
    in_other_process: Command,
    contents: Contents,
    tmp_path: Path,
) -> None:
    arguments = (
        *(*search, "ckpt=digits", "steps=20", "batch_size=4", "num_images=24", "npz=true"),
        *("guidance=default", "sag_scale=0.5", "gallery.num=2"),
    )
    command = (*arguments, *TWO_RANKS, "out=two")
    images = tmp_path / "two" / "images"
    killed_with(start(*command), images, 8)
    again = in_other_process(*command)
    assert again.code == 0, again.err
    single = in_process("sample", *arguments, "out=one").folder()
    two = {
        name: sha for name, sha in results(contents, tmp_path / "two").items() if "tmp" not in name
    }
    assert two == results(contents, single)
    assert '"lineage": [[0, ' in (single / "manifest.jsonl").read_text()


FAULTY = """
    from __future__ import annotations

    import os
    import time
    from dataclasses import dataclass
    from pathlib import Path

    import torch

    from sag_dit.guidance import Term


    @dataclass(frozen=True, kw_only=True)
    class Faulty(Term):
        fault: str

        @property
        def off(self):
            return False

        def contribution(self, ask):
            # While images are drawn, not when the cost is counted before.
            drawing = torch.distributed.is_initialized()
            rank = os.environ.get("LOCAL_RANK") if drawing else None
            if Path(self.fault).exists() and rank == "1":
                raise ValueError("this rank is out of luck")
            if Path(self.fault).exists() and rank == "2":
                time.sleep(200)
            yield from ()
            return torch.zeros_like(ask.base.x_t)
"""


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_command_which_can_be_repeated(
    sample: Command,
    in_other_process: Command,
    contents: Contents,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules, fault, folder = tmp_path / "modules", tmp_path / "fault", tmp_path / "many"
    modules.mkdir()
    (modules / "faulty_guidance.py").write_text(textwrap.dedent(FAULTY))
    fault.touch()
    arguments = (f"ckpt={tiny}", "steps=2", "batch_size=1")
    term = f"+guidance.faulty={{_target_:faulty_guidance.Faulty,fault:{fault}}}"
    command = (*arguments, "num_images=4", "trainer.accelerator=cpu", term, "out=many")

    # Rank 0 draws 0 and 3, rank 1 fails, and rank 2 would take some minutes.
    failed = in_other_process(*command, "trainer.devices=3", PYTHONPATH=str(modules))
    assert failed.code not in (0, None)
    assert "error: rank 1 failed: ValueError: this rank is out of luck" in failed.err
    assert "Traceback" not in failed.err
    assert load_all(folder / "images") == ["000000.png", "000003.png"]  # what is drawn is kept
    assert not (folder / "manifest.jsonl").exists()
    assert not failed.outlived  # else it would hold a GPU

    fault.unlink()
    kept = contents(folder / "images")
    monkeypatch.syspath_prepend(str(modules))
    assert sample(*arguments, "num_images=2", term, "out=many").code == 0
    # One image is missing now, so one of two ranks has nothing to do.
    again = in_other_process(*command, "trainer.devices=2", PYTHONPATH=str(modules))
    assert again.code == 0, again.err
    assert kept.items() < contents(folder / "images").items()
    assert not (folder / "ranks").exists()
    single = sample(*arguments, "num_images=4", "out=one").folder()
    for kind in ("images", "unguided", "maps"):
        assert contents(folder / kind) == contents(single / kind)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
@pytest.mark.parametrize(
    ("tell", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGINT)],
)
def test_two_ranks_leave_when_they_are_told(
    start: Command,
    tmp_path: Path,
    script: str,
    tell: Callable[[int, int], None],
    number: signal.Signals,
) -> None:
    """To the command alone, or all as Ctrl-C does, while they draw; no rank may outlive it."""
    own = ("out=two",) if script == "sample.py" else ("keep=true", "compare=none", "out=results")
    many = ("ckpt=digits", "steps=50", "num_images=4000", "batch_size=4", *own, *TWO_RANKS)
    process = start(*many, script=script)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(tmp_path.rglob("images/*.png"))) >= 4:
            break
        time.sleep(0.05)
    tell(process.pid, number)
    try:
        # The pipes end when the last process that can write to them has ended.
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 128 + number, out + err
    told = "stopped: what is finished is kept; repeat the command to go on"
    assert err.count(told) == 1
    assert "Traceback" not in err
    assert 4 <= len(list(tmp_path.rglob("images/*.png"))) < 4000
