"""Two processes measure what one measures, and end together when one of them fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Evaluate = Callable[..., Any]

SMALL = ("ckpt=digits", "steps=2", "num_images=41", "batch_size=10", "trainer.accelerator=cpu")
SETTINGS = ("-m", "cfg_scale=1,1.5", "plots=false")


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(
    evaluate: Evaluate, start: Command, kept_references: Path, tmp_path: Path
) -> None:
    one = evaluate(*SETTINGS, *SMALL).results
    process = start(
        *(*SETTINGS, *SMALL, "trainer.devices=2", "out=two", "finished=apart", "keep=true"),
        script="evaluate.py",
        SAG_DIT_CACHE=str(kept_references),
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two = json.loads((tmp_path / "two" / "results.json").read_text())["results"]
    # Rank 0 alone speaks.
    assert [line.split(":")[0] for line in out.splitlines() if "CFG 1.5" in line][:1] == [
        "cost of CFG 1.5"
    ]
    assert out.count("CFG 1.5") == 2
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["metrics"] == pytest.approx(mine["metrics"], rel=1e-6)
        assert theirs["identities"] == mine["identities"]
    folders = list(Path("outputs/sample").iterdir())
    assert [len(list((folder / "images").glob("*.png"))) for folder in folders] == [41, 41]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_command(
    start: Command, kept_references: Path, tmp_path: Path
) -> None:
    # Rank 1 alone meets an image that it cannot read.
    process = start(
        *(*SMALL, "compare=none", "trainer.devices=2", "keep=true"),
        script="evaluate.py",
        SAG_DIT_CACHE=str(kept_references),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "outputs" / "sample").iterdir()
    # Of the same size, since another would be noticed, and the image drawn again.
    image = folder / "images" / "000001.png"
    image.write_bytes(b"broken".ljust(image.stat().st_size))
    process = start(
        *(*SMALL, "compare=none", "trainer.devices=2", "keep=true", "finished=again"),
        script="evaluate.py",
        SAG_DIT_CACHE=str(kept_references),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "000001.png cannot be read" in err
    assert not list((tmp_path / "again").glob("*.json"))
