"""SiT's files: their time and sign are turned round at the door."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

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


@pytest.mark.parametrize("key", ["args", "hparams", "hyper_parameters", "config"])
def test_arguments_may_be_a_dictionary(network: DiT, tmp_path: Path, key: str) -> None:
    said = {"model": "SiT-S/2", "path_type": "Linear", "prediction": "noise", "num_heads": 1}
    torch.save({"ema": network.state_dict(), key: said}, tmp_path / "0000200.pt")
    denoiser: Any = load(tmp_path / "0000200.pt").denoiser
    assert (denoiser.kind, denoiser.process) == ("eps", Flow(start=0.999))
    assert denoiser.network.arguments["num_heads"] == 1


@pytest.fixture
def repa(make_dit: MakeDiT) -> tuple[DiT, dict[str, Tensor]]:
    """A DiT of as many output channels as input's, and its weights with REPA's projectors."""
    network = make_dit(in_channels=3, hidden_size=128, num_heads=2, depth=3, learn_sigma=False)
    heads = {f"projectors.0.{i}.{kind}": torch.ones(8) for i in (0, 2, 4) for kind in ("weight",)}
    return network, {**network.state_dict(), **heads}


@pytest.mark.parametrize("packed", ["flat", "args", "older", "folder"])
def test_repas_time_and_velocity_are_ours(
    repa: tuple[DiT, dict[str, Tensor]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    packed: str,
) -> None:
    network, state = repa
    path = tmp_path / "SiT-XL.pt"
    said = {"model": "SiT-B/2", "path_type": "linear", "prediction": "v", "proj_coeff": 0.5}
    if packed == "args":
        torch.save({"model": {}, "ema": state, "args": Namespace(**said)}, path)
    elif packed == "folder":
        # As the hub's mixin leaves it.
        flat = {"path_type": "linear", "num_heads": 2, "hidden_size": 128, "z_dims": [768]}
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(flat))
        path = tmp_path
    else:
        if packed == "older":
            state = {name.replace("blocks.2", "decoder_blocks.0"): t for name, t in state.items()}
        torch.save(state, path)
    denoiser: Any = load(path).denoiser
    assert (denoiser.kind, denoiser.process) == ("v", Flow())
    assert "REPA's projectors, which serve training, are left out" in caplog.text
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, t = torch.tensor([1, 2, 10]), torch.tensor([0.1, 0.5, 0.97])
    assert_near(denoiser(x, denoiser.process.level(t), y).v, network(x, t, y))


def test_repas_other_path_is_refused(repa: tuple[DiT, dict[str, Tensor]], tmp_path: Path) -> None:
    said = {"model": "SiT-B/2", "path_type": "cosine", "prediction": "v"}
    torch.save({"ema": repa[1], "args": said}, tmp_path / "cosine.pt")
    with pytest.raises(ValueError, match=r"path_type='cosine'.*expected path_type='linear'"):
        load(tmp_path / "cosine.pt")
