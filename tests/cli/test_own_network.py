"""A backbone from outside of the package: trained, gone on with, drawn from with SAG and CFG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sag_dit.checkpoints import load
from sag_dit.checkpoints.export import export
from tests.models.own import Tiny

Command = Callable[..., Any]

NONE = tuple(
    f"model.{name}=null" for name in ("hidden_size", "num_heads", "patch_size", "mlp_ratio")
)
OWN = ("experiment=digits", *NONE, "+model.family=tiny", "model.depth=1", "+model.width=8")
SHORT = ("data.batch_size=16", "every_n_steps.checkpoint=2", "out=run")


def pixels(folder: Path) -> np.ndarray[Any, Any]:
    """The images of a folder, in their order."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])


@pytest.mark.filterwarnings("ignore:kernel_size")
def test_a_network_of_ones_own_is_trained_and_guided(in_process: Command, tmp_path: Path) -> None:
    for steps in (2, 4):  # The second command goes on where the first one ended.
        done = in_process("train", *OWN, *SHORT, f"max_steps={steps}")
        assert done.code == 0, done.err
    model = load("run")
    network = model.class_conditional.network
    assert isinstance(network, Tiny) and network.arguments["width"] == 8
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) > 0
    drawn = {}
    for name, settings in {
        "plain": ("sag_scale=0",),
        "sag": ("sag_scale=2",),
        "cfg": ("sag_scale=0", "cfg_scale=3"),
    }.items():
        common = ("ckpt=run", "steps=3", "classes=[0,3]", "gallery.num=0", f"out={name}")
        done = in_process("sample", *common, *settings)
        assert done.code == 0, done.err
        drawn[name] = pixels(tmp_path / name)
    assert not np.array_equal(drawn["plain"], drawn["sag"])
    assert not np.array_equal(drawn["plain"], drawn["cfg"])
    export(model, "exported", "safetensors")
    assert load("exported").sha256 == model.sha256
    assert "tiny transformer" in (tmp_path / "exported" / "README.md").read_text()


def test_an_argument_that_it_does_not_take_is_refused(in_process: Command) -> None:
    done = in_process("train", *OWN, *SHORT, "max_steps=2", "+model.widht=8")
    assert done.code != 0 and "take no widht" in done.err
    assert "Did you mean width?" in done.err
