"""``--help`` of every command and of its groups."""

from __future__ import annotations

import pytest

from sag_dit.cli import typed
from sag_dit.cli.keys import COMMANDS
from sag_dit.cli.keys.key import keys_of, mapping_of
from sag_dit.cli.presets import with_presets
from sag_dit.methods import OF_ALL, methods
from tests.cli.test_schema import composed, error_of


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_names_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert composed(monkeypatch, name, "--help") == []
    lines = capsys.readouterr().out.splitlines()
    # A line of each method, and a screen.
    assert len(lines) < 85 + len(methods())
    assert sum(line.startswith(f"python {name}.py") for line in lines) == 2
    keys = {line.split()[0] for line in lines if line.strip()}
    assert keys >= set(typed.groups(name))
    declared = keys_of(COMMANDS[name]).items()
    assert keys >= {key for key, found in declared if mapping_of(*found) is None}


def test_help_of_a_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    composed(monkeypatch, "sample", *with_presets("sample", ["--help", "guidance"]))
    told = capsys.readouterr().out
    assert "guidance.sag.kernel_size=9 " in told and "stable_diffusion" in told
    for method in methods():
        assert f"{method.key}_scale: {method.title}; {method.neutral:g} is off" in told
        for name in method.settings:
            key = "KEY" if name in OF_ALL else method.key
            assert f"guidance.{key}.{name}=" in told and method.remarks[name] in told
    assert "no such group" in error_of(capsys, monkeypatch, "sample", "--help", "guidanse")


def told_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> list[str]:
    """What ``train.py --help`` prints, line by line."""
    composed(monkeypatch, "train", "--help", *words)
    return capsys.readouterr().out.splitlines()


def test_help_of_a_choice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = told_by(capsys, monkeypatch, "size=L")
    # Its keys lie in another mapping than the group's name says.
    assert "size=L; change a key as model.KEY=VALUE" in lines and "depth: 24" in lines
    assert any(line.split()[:3] == ["model.depth", "int|null", "24"] for line in lines)
    # Where nothing is chosen a choice is shown that holds something.
    lines = told_by(capsys, monkeypatch, "track")
    assert any(line.startswith("track.num_images") for line in lines)
    for wrong in ("size=M", "guidance", "trainer.devices"):
        assert f"--help {wrong}: " in error_of(capsys, monkeypatch, "train", "--help", wrong)
    assert "encode.py has none" in error_of(capsys, monkeypatch, "encode", "--help", "trainer")


def test_help_tells_keys_below_a_group_and_in_which_experiment_others_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = told_by(capsys, monkeypatch)
    keys = {line.split()[0]: line for line in lines if line}
    assert {"data.root", "data.batch_size", "trainer.devices", "process.num_timesteps"} <= set(keys)
    assert keys["freeze"].endswith("(experiment=finetune)")
    # Columns stand below each other, and lists of choices are wrapped.
    table = [line for key, line in keys.items() if "null: " in line and key in ("out", "ckpt")]
    assert len({line.index("null  ") for line in table}) == 1
    choices = lines[next(i for i, line in enumerate(lines) if line.startswith("groups")) + 1 :]
    assert choices and max(map(len, choices)) <= 100
