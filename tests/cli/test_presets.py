"""The bundled models are drawn and measured with settings of their own, unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sag_dit import catalogue
from sag_dit.cli.composing import config_folder, quoted
from sag_dit.cli.presets import with_presets


@pytest.mark.parametrize("model", catalogue.entries("bundled"))
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_every_bundled_model_has_them(command: str, model: str) -> None:
    arguments = with_presets(command, [f"ckpt={model}"])
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(command, [quoted(each) for each in arguments])
    assert set(arguments) > {f"ckpt={model}", f"guidance={model}"}
    # In a comparison all guidance is off, but for its rows.
    assert (config.sag_scale > 0) == (command == "sample")
    if command == "evaluate":
        assert config.compare.sag.sag_scale > 0


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("sample", [], ["guidance=emoji", "cfg_scale=2.0", "sag_scale=1.0"]),
        (
            "sample",
            ["ckpt=digits", "sag_scale=1"],
            ["guidance=digits", "ckpt=digits", "sag_scale=1"],
        ),
        (
            "sample",
            ["ckpt=digits", "guidance=default"],
            ["sag_scale=0.3", "ckpt=digits", "guidance=default"],
        ),
        ("sample", ["ckpt=mine.pt"], ["ckpt=mine.pt"]),
        # Other files of these folders are no models.
        ("sample", ["ckpt=adm128"], ["ckpt=adm128"]),
        ("sample", ["ckpt=methods"], ["ckpt=methods"]),
        (
            "sample",
            ["ckpt='patches'", "guidance={cfg: {rescale: 0.7}}"],
            [
                "guidance=patches",
                "sag_scale=0.5",
                "ckpt='patches'",
                "guidance={cfg: {rescale: 0.7}}",
            ],
        ),
        ("sample", ["experiment=paper/dit256"], ["experiment=paper/dit256"]),
        ("evaluate", [], []),
        (
            "evaluate",
            ["-m", "ckpt=patches", "sag_scale=0,1"],
            ["guidance=patches", "compare=patches", "-m", "ckpt=patches", "sag_scale=0,1"],
        ),
    ],
)
def test_what_is_stated_stays(command: str, arguments: list[str], expected: list[str]) -> None:
    assert with_presets(command, arguments) == expected
    assert with_presets(command, expected) == expected


def test_a_preset_of_the_users_own_states_scales(tmp_path: Path) -> None:
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "mine.yaml").write_text("# @package _global_\nsag_scale: 2.0\n")
    keys = ["ckpt=patches", "guidance=mine"]
    for flags in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert with_presets("sample", [*keys, *flags]) == [*keys, *flags]
    # Without it the model's own are added, as for any other that states none.
    (tmp_path / "guidance" / "mine.yaml").write_text("sag: {layer: blocks.2}\n")
    found = with_presets("sample", [*keys, "--config-dir", str(tmp_path)])
    assert "sag_scale=0.5" in found
