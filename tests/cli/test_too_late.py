"""What a user states and a run is too short for: it is told."""

from __future__ import annotations

import pytest

from sag_dit.cli.composing import compose
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import walk
from sag_dit.cli.schema import told_too_late


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["keep.best=3", "every_n_steps.validation=5"],
            [
                "every_n_steps.validation acts every 5 steps, and",
                "keep.best acts every 5 steps (every_n_steps.validation)",
            ],
        ),
        (
            ["preview.steps=3", "preview.classes=[1]"],
            ["preview.steps acts", "preview.classes acts"],
        ),
        (["track=fid", "track.every_n_steps=100"], ["track acts every 100", "track.every_n_steps"]),
        (["track=fid", "every_n_steps.preview=2"], []),
        (
            ["track=fid", "every_n_steps.preview=9"],
            ["every_n_steps.preview acts", "track acts"],
        ),
        (
            ["ema.further.sigma_rel=[0.1]", "every_n_steps.snapshot=5"],
            ["ema.further.sigma_rel acts", "every_n_steps.snapshot acts"],
        ),
        (["every_n_steps.preview=1000000000"], ["every_n_steps.preview acts every 1,000,000,000"]),
        (["keep.best=3", "every_n_steps.validation=4"], []),
    ],
)
def test_it_is_told_with_the_key_that_says_how_often(arguments: list[str], told: list[str]) -> None:
    lines = told_too_late(compose("train", ["experiment=digits", *arguments]), steps=4)
    assert len(lines) == len(told)
    assert all(line.endswith("and the run has 4") for line in lines)
    for part in told:
        assert any(line.startswith(f"note: {part}") for line in lines), (part, lines)


def test_every_key_that_is_named_is_one() -> None:
    for schema in COMMANDS.values():
        paths = {path for path, _, _ in walk(schema)}
        for path, _, told in walk(schema):
            assert {*filter(None, told.every.split(" or "))} <= paths, path
