"""SiT's files: their time and sign are turned round at the door."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sag_dit import catalogue
from sag_dit.checkpoints import build, describe, load
from sag_dit.models import DiT
from sag_dit.process import Flow
from tests.closeness import assert_near
from tests.conftest import MakeDiT


@pytest.fixture
def network(make_dit: MakeDiT) -> DiT:
    """What a SiT's own code would be: a DiT whose second half of the channels is dropped."""
    return make_dit(in_channels=3, hidden_size=128, num_heads=2, depth=2)


def test_a_flat_file_is_known_by_its_name(network: DiT, tmp_path: Path) -> None:
    path = tmp_path / "SiT-XL-2-256x256.pt"
    torch.save(network.state_dict(), path)
    denoiser = load(path).denoiser
    assert denoiser.process == Flow() and denoiser.kind == "v"
    assert not denoiser.network.learn_sigma
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, t = torch.tensor([1, 2, 10]), torch.tensor([0.1, 0.5, 0.97])
    velocity = network(x, 1 - t, y)[:, :3]
    assert_near(denoiser(x, denoiser.process.level(t), y).v, -velocity)
    assert catalogue.entries()["SiT-XL-2"].file == path.name
    # The same weights under another name are a DiT's.
    assert load(path.rename(tmp_path / "DiT.pt")).denoiser.kind == "eps"


@pytest.mark.parametrize(("prediction", "kind"), [("noise", "eps"), ("score", "score")])
def test_its_training_script_says_what_is_predicted(
    network: DiT, tmp_path: Path, prediction: str, kind: str
) -> None:
    args = Namespace(model="SiT-S/2", path_type="Linear", prediction=prediction, num_classes=10)
    path = tmp_path / "0000200.pt"
    torch.save({"model": {}, "ema": network.state_dict(), "args": args}, path)
    denoiser = load(path).denoiser
    assert (denoiser.kind, denoiser.process) == (kind, Flow(start=0.999))
    assert denoiser.process.grid(3)[0].alpha > 0
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, t = torch.tensor([1, 2]), torch.tensor([0.2, 0.9])
    said = network(x, 1 - t, y)[:, :3]
    level = denoiser.process.level(t)
    prediction_of = denoiser(x, level, y)
    eps = said if prediction == "noise" else -level.sigma * said
    assert_near(prediction_of.eps, eps)
    # Its description builds it anew, and only a start that is not the usual one is named.
    assert describe(build(describe(denoiser)))["process"]["start"] == 0.999
    assert (
        "start" not in describe(build({**describe(denoiser), "process": {"shift": 1.0}}))["process"]
    )
