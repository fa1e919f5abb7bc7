"""Fine-tuning of a network of one's own: other classes, another resolution, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sag_dit
from sag_dit.training.callbacks import forward_flops
from sag_dit.training.finetune import adapt
from tests.data.making import image_folder

Command = Callable[..., Any]

NETS = '''
import torch
from sag_dit.models import Backbone
from torch import nn


class Conv(Backbone):
    """Of any size: a table with a null row, a layer of one-hot classes, and a gain for each."""

    def __init__(self, input_size, in_channels, num_classes, width=8):
        super().__init__()
        self.input_size, self.in_channels = (input_size, input_size), in_channels
        self.num_classes = self.null_label = num_classes
        # What a copy without memory could not have: plain numbers, and tensors no file holds.
        self.rates = [rate.item() for rate in torch.linspace(0.5, 1, 2)]
        self.scale = torch.tensor(0.5)
        self.register_buffer("powers", torch.arange(width).float() / width, persistent=False)
        self.register_buffer("ramp", torch.linspace(-1, 1, input_size))
        self.layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.label = nn.Embedding(num_classes + 1, width)
        self.hot = nn.Linear(num_classes, 4, bias=False)
        self.gain = nn.Parameter(torch.randn(num_classes))

    def forward(self, x, t, y):
        hot = nn.functional.one_hot(y, self.num_classes + 1)[:, :-1].float()
        told = (self.label(y) * self.powers).sum(1) + self.hot(hot).sum(1) + hot @ self.gain
        return self.layer(x) * self.scale + self.ramp + told[:, None, None, None]


class Fixed(Conv):
    def __init__(self, in_channels, num_classes):
        super().__init__(8, in_channels, num_classes)


class Ten(Conv):
    def __init__(self, input_size, in_channels):
        super().__init__(input_size, in_channels, 10)


class Placed(Conv):
    def __init__(self, input_size, in_channels, num_classes):
        super().__init__(input_size, in_channels, num_classes)
        self.place = nn.Parameter(torch.zeros(input_size, input_size))


class Blind(Backbone):
    def __init__(self, input_size, in_channels):
        super().__init__()
        self.input_size, self.in_channels = (input_size, input_size), in_channels
        self.num_classes = 0
        self.layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.layer(x)
'''
CPU = ("trainer.accelerator=cpu", "trainer.devices=1")
SHORT = (*CPU, "data.batch_size=16", "max_steps=2", "preview.guidance.sag=null", "logger=none")


@pytest.fixture
def train(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``train.py`` where the networks' file lies."""
    (tmp_path / "conv_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    image_folder(tmp_path / "photos", classes=("cats", "7"), side=16)

    def run(*arguments: str) -> Any:
        return in_process("train", *SHORT, *arguments)

    return run


def begun(train: Command, network: str, *arguments: str) -> None:
    own = (f"model._target_=conv_nets.{network}", *arguments)
    done = train("experiment=digits", *own, "out=base")
    assert done.code == 0, done.err


TUNE = ("experiment=finetune", "imports=[conv_nets]", "data=digits")


def test_other_classes(train: Command, in_process: Command) -> None:
    """A run, its export, and what was fine-tuned from it: rows by name, all else as it was."""
    begun(train, "Conv", "data.classes=[0,1,2,3]")
    exported = in_process("export", "ckpt=base", "imports=[conv_nets]", "out=exported")
    assert exported.code == 0, exported.err
    before = load_file("base/model.safetensors")
    for source in ("base", "exported"):
        frozen = ("freeze=[layer,label,hot,gain.?,powers]",)
        refused = train(*TUNE, *frozen, f"ckpt={source}", "out=refused")
        assert refused.code == 1 and "gain.?" in refused.err
        # A rate of zero leaves what adapt has made.
        none = ("optimizer.lr=0", "ema.decay=null", "data.classes=[3,9,1]")
        done = train(*TUNE, *none, f"ckpt={source}", f"out=of_{source}")
        assert done.code == 0, done.err
        assert "label.weight, a label table of 4 classes: now 3" in done.out
        assert "2 known (3, 1), 1 new (9)" in done.out and "positions" not in done.out
        after = load_file(f"of_{source}/model.safetensors")
        assert torch.equal(after["label.weight"], before["label.weight"][[3, 4, 1, 4]])
        mean = before["hot.weight"].mean(1, keepdim=True)
        hot = torch.cat([before["hot.weight"][:, [3]], mean, before["hot.weight"][:, [1]]], 1)
        assert torch.equal(after["hot.weight"], hot)
        assert torch.equal(after["gain"][[0, 2]], before["gain"][[3, 1]])
        assert torch.equal(after["layer.weight"], before["layer.weight"])
    drawn = in_process(
        *("sample", "ckpt=of_base", "imports=[conv_nets]", "classes=['9']", *CPU),
        *("num_images=1", "steps=2", "sag_scale=0", "cfg_scale=2", "gallery.num=0"),
    )
    assert drawn.code == 0, drawn.err


def test_another_resolution_and_adapters(train: Command) -> None:
    begun(train, "Conv")
    photos = ("data=folder", "data.root=photos", "data.channels=1", "data.batch_size=4")
    fit = ("experiment=finetune", "imports=[conv_nets]", "ckpt=base", *photos)
    done = train(*fit, "resolution=12", "out=large")
    assert done.code == 0, done.err
    assert "ramp: computed for 12 x 12" in done.out and "1 known (7), 1 new (cats)" in done.out
    model = sag_dit.load("large")
    assert model.class_conditional.latent_shape == (1, 12, 12)
    # Beside adapters the new rows alone are trained.
    pytest.importorskip("peft")
    adapted = train(*fit, "resolution=8", "lora.rank=2", "lora.targets=[hot]", "out=lora")
    assert adapted.code == 0, adapted.err
    assert "1 new (cats)" in adapted.out and "LoRA     12 parameters added to hot" in adapted.out
    saved = load_file("lora/model.safetensors")
    assert torch.equal(saved["layer.weight"], load_file("base/model.safetensors")["layer.weight"])
    assert saved["hot.weight"].shape == (4, 2)


@pytest.mark.parametrize(
    ("network", "change", "told"),
    [
        ("Ten", "data.classes=[3,4]", "Ten has no argument num_classes, so that it cannot learn"),
        ("Fixed", "resolution=12", "Fixed has no argument input_size, and its x_t stays 8 x 8"),
        ("Placed", "resolution=12", "place of Placed is trained, and is (8, 8) at 8 x 8 and (12"),
        ("Blind", "data.classes=[3,4]", "Blind was trained without classes, so that it cannot"),
        ("Conv", "lora.targets=[mlp]", "'mlp' matches no linear layer"),
        ("Conv", "resolution=[8,12]", "a checkpoint is fine-tuned on squares"),
    ],
)
def test_what_a_network_does_not_allow_is_told_in_a_sentence(
    network: str, change: str, told: str, train: Command
) -> None:
    begun(train, network, *(("data.classes=[3]",) if network == "Blind" else ()))
    lora = ("lora.rank=2",) if "lora" in change else ()
    refused = train(*TUNE, "ckpt=base", change, *lora, "out=tuned")
    assert refused.code == 1 and told in refused.err, refused.err
    assert "Traceback" not in refused.err and not Path("tuned").exists()


def test_what_no_file_holds_is_there_when_a_network_is_loaded(train: Command) -> None:
    """Buffers that are not saved and plain tensors, of which a copy without memory has none."""
    begun(train, "Conv", "data.classes=[0,1]")
    torch.manual_seed(0)
    untouched = torch.rand(1)
    torch.manual_seed(0)
    model = sag_dit.load("base")
    assert torch.equal(torch.rand(1), untouched)
    network = model.class_conditional.network
    assert torch.equal(network.powers, torch.arange(8.0) / 8) and network.rates == [0.5, 1.0]
    assert float(network.scale) == 0.5
    # And it is counted, a multiplication and an addition for each of 9 weights, padding included.
    flops = forward_flops(model)
    assert flops is not None and flops >= 2 * 9 * 64
    with pytest.raises(ValueError, match="no classes"):
        adapt(model, "none", (), 8)
