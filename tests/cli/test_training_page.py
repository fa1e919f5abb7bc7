"""docs/training.md: its commands are run, as a reader would, in few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sag_dit.cli.schema import determining
from sag_dit.cli.trainer_flags import OF_TRAINING
from tests.pages import ROOT, Page, run

PAGE = Page.of("training.md")
START = Page(PAGE.text.split("\n## ")[0])
FROM_PYTHON = "All of it from Python"
SECTIONS = ("Going on with changes", "Checkpoints and averages")
SMALL = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3", "data.batch_size=16")


def commands(title: str) -> list[str]:
    """The commands of a section, with a hundredth of their steps."""
    lines = PAGE.section(title).commands
    fewer = [re.sub(r"max_steps=(\d+)00\b", r"max_steps=\1", each) for each in lines]
    return [re.sub(r"snapshot=\d+", "snapshot=1", each) for each in fewer]


def test_it_names_the_trainer_s_arguments_that_are_refused() -> None:
    text = PAGE.section("Arguments of the Trainer").text.split("These are refused")[1]
    assert set(re.findall(r"`(\w+)`", text)) == {*OF_TRAINING}


@pytest.mark.slow  # each command is a process of its own, as a reader starts it
def test_the_first_commands_run(tmp_path: Path) -> None:
    train, sample = START.commands
    _, script, *arguments = shlex.split(train)
    run([str(ROOT / script), *arguments, *SMALL, "max_steps=4"], tmp_path)
    _, script, *arguments = shlex.split(sample)
    run([str(ROOT / script), *arguments, "steps=2"], tmp_path)


def test_every_page_and_section_that_it_sends_to_is_there() -> None:
    for page, anchor in re.findall(r"\]\((\w+\.md)?#?([\w-]*)\)", START.text):
        text = Page.of(page or "training.md").text
        titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        assert not anchor or anchor in [each.lower().replace(" ", "-") for each in titles]


@pytest.mark.slow  # each command is a process of its own, as a reader starts it
def test_the_commands_of_the_trainer_run(tmp_path: Path) -> None:
    found = PAGE.section("Arguments of the Trainer").commands
    for command in found:
        program, *arguments = shlex.split(command)
        assert program == "python"
        run([*arguments, *SMALL], tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"stops", "logs", "again", "second"}


@pytest.mark.slow  # each command is a process of its own, as a reader starts it
@pytest.mark.parametrize("title", SECTIONS)
def test_its_commands_run(title: str, tmp_path: Path) -> None:
    found = commands(title)
    assert len(found) >= 3
    for command in found:
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        small = [each for each in SMALL if each.split("=")[0] not in command]
        fresh = script == "train.py" and "ckpt=" not in command
        own = [*small, "every_n_steps.checkpoint=2"] if fresh else []
        told = run([str(ROOT / script), *arguments, *own], tmp_path)
        if "resume_from" in command:
            assert "goes on from step 4 of first; what differs:" in told
            assert "data.batch_size: there 16, now 128" in told
    assert len(PAGE.section(title).blocks) >= 2


def test_it_lists_all_that_may_change_within_a_run() -> None:
    text = PAGE.section(SECTIONS[0]).text.split("**Within one run**")[1].split("\n\n")[0]
    told = set(re.findall(r"`([\w.]+)`", text)) - {"config.yaml", "changed"}
    keys = {key for key in determining("train", "nothing") if key != "out"}
    heads = {key for key in keys if not any(key.startswith(f"{other}.") for other in keys)}
    assert told == heads


@pytest.mark.slow  # each command is a process of its own, as a reader starts it
def test_a_whole_run_from_python_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    for name in ("networks.md", "data.md", "training.md"):
        Page.of(name).write(tmp_path)
    first, second, sample = (shlex.split(each)[1:] for each in PAGE.section(FROM_PYTHON).commands)
    run(first, tmp_path)
    assert [*(tmp_path / "whole" / "checkpoints").glob("step-00000008.ckpt")]
    run(second, tmp_path)
    run(sample, tmp_path)
    stopped = (tmp_path / "whole").rename(tmp_path / "stopped")
    run(second, tmp_path)
    here, there = (load_file(each / "model.safetensors") for each in (stopped, tmp_path / "whole"))
    assert [name for name in there if not torch.equal(here[name], there[name])] == []
