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
    assert len(lines) < 80
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
