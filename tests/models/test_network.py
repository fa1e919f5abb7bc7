"""The contract of a network, and the families that read and build networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sag_dit.checkpoints import from_denoiser, load
from sag_dit.checkpoints.export import export
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT, Family, families, family_of, register
from sag_dit.models.network import MEMBERS, lacking
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from sag_dit.training.finetune import adapt
from tests.conftest import MakeDiT
from tests.models.own import Tiny, TinyFamily


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny(input_size=8, in_channels=1, num_classes=3)


def test_networks_have_what_the_contract_asks_for(tiny_dit: DiT) -> None:
    unet = UNet(8, 1, 32, 1, (1, 2), (4,), num_heads=1)
    assert lacking(tiny_dit) == lacking(unet) == lacking(tiny()) == []
    for network in (tiny_dit, unet, tiny()):
        assert network.key in families()
    assert {"layers", "blocks", "checkpoint_blocks", "arguments", "__call__"} < set(MEMBERS)


def test_a_network_without_a_member_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"network=Linear: lacks key, arguments, input_size, "):
        ClassConditional(nn.Linear(1, 1), DDPM())  # type: ignore[arg-type]
    network = tiny()
    ClassConditional(network, DDPM())
    del network.null_label
    with pytest.raises(ValueError, match=r"network=Tiny: lacks null_label; expected all members"):
        ClassConditional(network, DDPM())


def test_a_family_is_told_by_its_config_or_by_names(make_dit: MakeDiT) -> None:
    known = families()
    assert family_of({"family": "tiny"}) is known["tiny"]
    assert family_of({"model_channels": 32}) is known["unet"]
    assert family_of({"hidden_size": 32}) is known["dit"]
    openai = dict.fromkeys(("input_blocks.0.0.weight", "time_embed.0.weight"), torch.zeros(1))
    assert family_of({}, openai) is known["unet"]
    assert family_of({}, make_dit().state_dict()) is known["dit"]
    assert family_of({}) is known["dit"]
    with pytest.raises(ValueError, match=r"model.family='tinny': expected one of dit, tiny, unet"):
        family_of({"family": "tinny"})
    with pytest.raises(ValueError, match=r"model.family=\['dit'\]: expected one of dit"):
        family_of({"family": ["dit"]})


def test_families_have_keys_of_their_own() -> None:
    class Copy(TinyFamily):
        pass

    with pytest.raises(ValueError, match="Copy: TinyFamily has the key 'tiny'"):
        register(Copy)
    # A notebook makes a class anew, in the same module and under the same name.
    Copy.__module__, Copy.__qualname__ = TinyFamily.__module__, TinyFamily.__qualname__
    try:
        register(Copy)
        assert type(families()["tiny"]) is Copy
    finally:
        register(TinyFamily)
    assert isinstance(families()["tiny"], Family)


@pytest.mark.parametrize("bare", [True, False])
def test_a_network_of_ones_own_goes_through_a_file(tmp_path: Path, bare: bool) -> None:
    network = tiny()
    model = from_denoiser(ClassConditional(network, DDPM(), x_0_range=(-1, 1)).eval(), "small")
    assert model.config["model"] == {"family": "tiny", **network.arguments}
    done = export(model, tmp_path / "out", "safetensors")
    assert "class-conditional tiny transformer" in (tmp_path / "out" / "README.md").read_text()
    # The file alone holds its config as well.
    again = load(done.path.rename(tmp_path / "alone.safetensors") if bare else tmp_path / "out")
    assert again.config == model.config | {"weights": "ema"}
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.denoiser.network.state_dict()[name], tensor)
    with pytest.raises(ValueError, match=r"cannot express this model: a Tiny, where it has a DiT"):
        export(model, tmp_path / "dit", "dit")
    with pytest.raises(ValueError, match=r"ckpt=small: a Tiny, .*expected a DiT"):
        adapt(model, "tuned", ["a"], 8)


def test_a_config_of_a_network_of_ones_own_is_checked() -> None:
    with pytest.raises(ValueError, match=r"missing in_channels, num_classes, unknown heads"):
        family_of({"family": "tiny"}).build({"family": "tiny", "input_size": 8, "heads": 2})
