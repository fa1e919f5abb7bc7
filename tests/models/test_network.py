"""The contract of a network, and the families that read and build networks."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sag_dit.checkpoints import build, describe, from_denoiser, load
from sag_dit.checkpoints.export import export
from sag_dit.denoiser import ClassConditional
from sag_dit.models import Backbone, DiT, Family, families, family_for, family_of, register
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


class Wide(Backbone):
    """A network of one's own, with arguments by place, by name and further ones."""

    def __init__(self, side: int, channels: int = 1, *, width: int = 4, **further: int) -> None:
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = (side, side), channels, 3
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Narrow(DiT):
    """Another arithmetic under the key of DiT."""


def test_a_backbone_knows_its_arguments_and_is_built_from_them_again() -> None:
    network = Wide(8, width=6, more=2)
    assert lacking(network) == []
    assert network.arguments == {"side": 8, "width": 6, "more": 2}
    assert deepcopy(network).arguments == network.arguments
    denoiser = ClassConditional(network, DDPM())
    config = describe(denoiser)
    assert config["model"] == {"_target_": f"{__name__}.Wide", "side": 8, "width": 6, "more": 2}
    again = build(json.loads(json.dumps(config))).network
    assert type(again) is Wide and again.arguments == network.arguments
    # What it does not have, those who need it refuse.
    assert denoiser.null(1) is None
    with pytest.raises(ValueError, match="this model has no self-attention layers to read"):
        denoiser.layer("auto")
    with pytest.raises(ValueError, match="compile=true: Wide has no blocks to compile"):
        denoiser.compile_blocks()
    with pytest.raises(ValueError, match="checkpoint_blocks=true: Wide does not recompute"):
        network.checkpoint_blocks = True
    with pytest.raises(ValueError, match=r"model.side=.*: expected a number, a word, or a list"):
        describe(ClassConditional(Wide(np.int64(8)), DDPM()))


def test_a_subclass_is_no_member_of_its_parents_family(tiny_dit: DiT) -> None:
    told = dict(tiny_dit.arguments)
    assert family_for(tiny_dit) is families()["dit"]
    narrow = Narrow(**told)
    assert describe(ClassConditional(narrow, DDPM()))["model"]["_target_"] == f"{__name__}.Narrow"
    # A class that torch has made around one is that one.
    sharded = type("FSDPDiT", (DiT,), {"__module__": "torch.distributed.fsdp"})
    assert family_for(sharded(**told)) is families()["dit"]


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
