"""Training where the network's device holds no float64: objectives, averages, what watches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.cli import train as train_command
from sag_dit.cli.app import launch

SMALL = (
    "experiment=digits",
    "data.batch_size=8",
    "max_steps=3",
    "every_n_steps.log=1",
    "every_n_steps.checkpoint=2",
    "every_n_steps.preview=2",
    "every_n_steps.validation=2",
    "preview.steps=2",
    "preview.classes=[3,7]",
    "trainer.enable_progress_bar=false",
)
DIT = ("model.hidden_size=24", "model.depth=2", "model.num_heads=2")
OBJECTIVES = {
    "mse": (*DIT, "objective=mse", "kind=eps", "process=linear"),
    "min_snr": (*DIT, "objective=min_snr", "kind=v"),
    "dit": (*DIT, "objective=dit", "kind=eps", "process=linear", "model.learn_sigma=true"),
    "flow": (*DIT, "objective=flow", "kind=v", "process=flow"),
    "unet": ("size=digits_unet", "objective=dit", "model.learn_sigma=true"),
    "tracked": (*DIT, "track=fid", "track.num_images=20", "track.steps=2"),
    "plain": (*DIT, "ema.decay=null", "trainer.accumulate_grad_batches=2"),
}


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Tensor]:
    """Run ``train.py`` here, and return the weights it leaves."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch("train", train_command.run_train, [*SMALL, *arguments, f"out={folder}"])
    assert list((folder / "previews").glob("*.png"))
    return load_file(folder / "model.safetensors")


# Under the usual epsilon Adam turns rounding of a gradient near nothing into a whole step.
STEADY = ("+optimizer.eps=1", "optimizer.lr=0.3")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(
    mps: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = (*OBJECTIVES[name], *STEADY)
    expected = trained(tmp_path / "a", monkeypatch, *options, "trainer.accelerator=cpu")
    found = trained(tmp_path / "b", monkeypatch, *options, "trainer.accelerator=mps")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)  # some moved by 0.1
