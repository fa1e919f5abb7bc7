"""The bundled models are drawn and measured with settings of their own, unless told otherwise."""

from __future__ import annotations

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
    assert config.guidance.sag.layer.startswith("blocks.")
    assert config.guidance.sag.interval != [0.0, 1.0]
    # In a comparison all guidance is off, but for its rows.
    assert (config.sag_scale > 0) == (command == "sample")
    if command == "evaluate":
        assert config.compare.sag.sag_scale > 0


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("sample", [], ["guidance=digits", "sag_scale=0.3"]),
        ("sample", ["sag_scale=1"], ["guidance=digits", "sag_scale=1"]),
        ("sample", ["guidance=default"], ["sag_scale=0.3", "guidance=default"]),
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
