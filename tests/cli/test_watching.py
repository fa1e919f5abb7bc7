"""What ``train.py`` tells and logs, from the command line; docs/training.md says all of it."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import TINY
from tests.pages import ROOT, Page, run

Command = Callable[..., Any]

SECTION = Page.of("training.md").section("Watching")
SMALL = (
    *TINY,
    "every_n_steps.validation=2",
    "every_n_steps.preview=2",
    "preview.classes=[3]",
    "preview.steps=1",
)


def columns(folder: Path) -> dict[str, list[str]]:
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def test_a_run_tells_what_it_is_and_where_it_goes_on(in_process: Command, tmp_path: Path) -> None:
    track = ("track=fid", "track.num_images=4", "track.steps=1", "track.metrics=[fid]")
    first = in_process("train", *SMALL, *track, "out=run", "max_steps=2")
    assert first.code == 0, first.err
    data, model, parts, steps, memory, *_ = first.out.splitlines()
    assert data == "data: 1,797 images in 10 classes: 1,078 to train on, 719 held out"
    assert model.startswith("model: DiT, ") and "blocks " in parts
    assert steps == "steps: 2 of 8 images on 1 device, 16 images in all: 0.0 epochs"
    assert memory.startswith("memory: about ") and "activations of 8 images" in memory
    assert "going on" not in first.out
    assert re.search(r"^step 1 of 2: loss \d", first.err, re.MULTILINE)
    assert re.search(r"^step 2 of 2: loss .* GB$", first.err, re.MULTILINE)
    assert re.search(r"^step 2 of 2: val/loss \d", first.err, re.MULTILINE)
    assert "\r" not in first.err, "a bar is for a terminal"
    # FD is measured at each preview.
    found = columns(tmp_path / "run")
    assert len(found["metrics/fid"]) == 1
    again = in_process("train", *SMALL, "out=run", "max_steps=3")
    assert "going on from step 2 of 3" in again.out
    assert len(columns(tmp_path / "run")["metrics/fid"]) == 1
    # The page names every column.
    named = set(re.findall(r"`([\w/]+)`", SECTION.text)) | {
        f"loss_by_level/{part}_of_4" for part in range(1, 5)
    }
    assert found.keys() <= named, found.keys() - named


def test_without_a_bar_nothing_is_told_while_it_trains(in_process: Command) -> None:
    outcome = in_process(
        "train", *SMALL, "out=run", "max_steps=1", "trainer.enable_progress_bar=false"
    )
    assert outcome.code == 0 and outcome.err == ""


def test_settings_of_a_sweep_lie_beside_each_other_and_go_on(
    in_process: Command, tmp_path: Path
) -> None:
    swept = ("-m", *SMALL, "out=runs", "seed=0,1", "logger=none")
    outcome = in_process("train", *swept, "max_steps=1")
    assert outcome.code == 0, outcome.err
    told = [line for line in outcome.out.splitlines() if re.match(r"\d of 2: ", line)]
    assert told == [f"{s + 1} of 2: seed={s}, out=runs/seed={s}" for s in (0, 1)]
    assert {each.name for each in (tmp_path / "runs").iterdir()} == {"seed=0", "seed=1"}
    again = in_process("train", *swept, "max_steps=1")
    assert again.code == 0 and again.out.count("finished at step 1") == 2


def test_the_page_s_files_and_commands_run(tmp_path: Path) -> None:
    SECTION.write(tmp_path)
    quick = ["trainer.accelerator=cpu", "model.hidden_size=24", "model.depth=1"]
    commands = [[*shlex.split(each)[1:], *quick] for each in SECTION.commands]
    for arguments in [*commands, ["my_run.py"]]:
        run(arguments, tmp_path)
    for folder in ("watched", "by_hand"):
        found = columns(tmp_path / folder)
        assert len(found["train/loss_spread"]) == 2
        assert float(found["train/loss_spread"][0]) > 0


TWO = '''
import json
from pathlib import Path

from lightning.pytorch import Callback


class Keeps(Callback):
    """Writes the losses of each rank."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(pl_module.last_losses.per_image.tolist())

    def on_train_end(self, trainer, pl_module):
        Path(f"rank-{trainer.global_rank}.json").write_text(json.dumps(self.losses))
'''


@pytest.mark.slow  # two processes, which import for some seconds each
def test_losses_are_those_of_both_ranks(in_other_process: Command, tmp_path: Path) -> None:
    import json

    (tmp_path / "keeps.py").write_text(TWO)
    outcome = in_other_process(
        *SMALL,
        "out=run",
        "max_steps=4",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.callbacks={_target_: keeps.Keeps}",
        script="train.py",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert outcome.code == 0, outcome.err
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    found = columns(tmp_path / "run")
    for step, logged in enumerate(found["train/loss"]):
        both = ranks[0][step] + ranks[1][step]
        assert len(both) == 8
        assert float(logged) == pytest.approx(sum(both) / 8, rel=1e-5)
    levels = {name: values for name, values in found.items() if name.startswith("loss_by_level")}
    assert len(levels) == 4 and all(levels.values())
