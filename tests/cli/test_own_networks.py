"""docs/networks.md: networks, objectives and autoencoders of one's own: its files and commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sag_dit
from sag_dit.checkpoints.config import build
from sag_dit.checkpoints.loading import find_codec
from sag_dit.cli.train_model import refuse_foreign_sizes
from sag_dit.data.images import Crops, find_images
from sag_dit.data.shards import read_index
from tests.data.making import image_folder
from tests.pages import Page, run

ROOT = Path(__file__).resolve().parents[2]
PAGE = Page.of("networks.md")
CPU = ("trainer.accelerator=cpu", "trainer.devices=1")
SHORT = (*CPU, "data.batch_size=16", "every_n_steps.checkpoint=2", "max_steps=4")
NET = ("experiment=digits", "model._target_=my_net.Mine", "model.width=16", "model.depth=2")

Command = Callable[..., Any]


@pytest.fixture
def files(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in the working directory, on the path, none of them imported."""
    PAGE.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PAGE.files:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)


@pytest.mark.slow  # Each command is a process of its own, as a reader starts it.
@pytest.mark.parametrize("commands", PAGE.blocks, ids=lambda each: each[0].split("=")[-1])
def test_its_commands_run(commands: list[str], files: Path) -> None:
    image_folder(files / "photos", side=24)
    for command in commands:
        program, *arguments = shlex.split(command)
        cpu = CPU if {"train", "sample", "encode"} & {*arguments} else ()
        assert program == "python"
        run([*arguments, *cpu], files)


def test_its_arguments_are_plain_values(in_process: Command, files: Path) -> None:
    made = "model.width={_target_: torch.nn.SiLU}"
    refused = in_process("train", *NET[:2], made, *SHORT, "out=refused")
    assert refused.code == 1 and "the arguments of a network are plain values" in refused.err
    assert not Path("refused").exists()


@pytest.mark.filterwarnings("ignore:kernel_size")
def test_a_network_named_by_its_class(
    in_process: Command, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trained at once, and in two parts.
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        done = in_process("train", *NET, *SHORT, f"max_steps={steps}", f"out={out}")
        assert done.code == 0, done.err
    whole, parts = (load_file(files / out / "model.safetensors") for out in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    # A file imports nothing.
    forget(monkeypatch)
    draw = ("sample", "ckpt=whole", *CPU, "num_images=2", "steps=3", "gallery.num=0")
    guided = ("cfg_scale=2", "sag_scale=0.5")
    refused = in_process(*draw, *guided, "out=drawn")
    assert refused.code == 1 and "Traceback" not in refused.err
    assert "model._target_=my_net.Mine" in refused.err and "imports=[my_net]" in refused.err
    assert "my_net" not in sys.modules and not (files / "drawn").exists()
    missing = in_process(*draw, "imports=no_such_net", "out=drawn")
    assert "imports=no_such_net: there is no module no_such_net; start Python" in missing.err
    # What its user names is drawn from with guidance, exported, and loaded with its arguments.
    done = in_process(*draw, *guided, "imports=[my_net]", "out=drawn")
    assert done.code == 0, done.err
    model = sag_dit.load("whole")
    network = model.class_conditional.network
    assert type(network).__name__ == "Mine" and network.arguments["width"] == 16
    from sag_dit.checkpoints.export import export

    export(model, "exported", "safetensors")
    assert sag_dit.load("exported").sha256 == model.sha256
    assert "class-conditional Mine" in (files / "exported" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"format=dit: .* this model: a Mine, where"):
        export(model, "other", "dit")


@pytest.mark.filterwarnings("ignore:kernel_size")
def test_what_a_network_lacks_is_told_by_the_method(in_process: Command, files: Path) -> None:
    (files / "plain_net.py").write_text(PLAIN)
    plain = ("experiment=digits", "model._target_=plain_net.Plain", *SHORT, "out=run")
    shown = in_process("train", *plain, "preview.guidance.sag.scale=1")
    assert shown.code == 1 and "this model has no self-attention layers to read" in shown.err
    assert "preview.guidance.sag=null" in shown.err and not (files / "run").exists()
    done = in_process("train", *plain)
    assert done.code == 0, done.err
    draw = ("sample", "ckpt=run", "imports=[plain_net]", *CPU, "num_images=1", "steps=2")
    for scale, told in (("sag_scale=1", "self-attention"), ("cfg_scale=2", "dropout")):
        off = {"sag_scale": "sag_scale=0", "cfg_scale": "cfg_scale=1"} | {
            scale.partition("=")[0]: scale
        }
        refused = in_process(*draw, *off.values(), "out=drawn")
        assert refused.code == 1 and told in refused.err, refused.err
        assert scale != "sag_scale=1" or "leave SAG out: sag_scale=0" in refused.err
    drawn = in_process(*draw, "sag_scale=0", "blur_scale=1", "gallery.num=0", "out=drawn")
    assert drawn.code == 0, drawn.err
    for option in ("compile=true", "checkpoint_blocks=true"):
        refused = in_process("train", *plain, "preview.guidance.sag=null", option)
        assert refused.code == 1 and f"{option}: Plain" in refused.err


PLAIN = """
import torch
from sag_dit.models import Backbone, DiT
from torch import nn

class Plain(Backbone):
    def __init__(self, in_channels, num_classes, side=8, note=None):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = (side, side), in_channels, num_classes
        self.layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.layer(x)

class Wide(Backbone):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = (16, 32), in_channels, num_classes
        self.layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.layer(x)

class HandsOn(Plain):
    def __init__(self, kernel=3, **options):
        super().__init__(**options)

class Forgets(Plain):
    arguments = {}

    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes)
        object.__setattr__(self, "arguments", {})

class Other(nn.Module):
    key = "other"

class Narrow(DiT):
    def __init__(self, input_size, in_channels, num_classes):
        super().__init__(input_size=input_size, in_channels=in_channels, num_classes=num_classes,
                         patch_size=4, hidden_size=24, depth=1, num_heads=2)
"""


def test_options_that_are_handed_on(in_process: Command, files: Path) -> None:
    """What ``**options`` reach is what the bases name: no patch_size, which nobody stated."""
    (files / "plain_net.py").write_text(PLAIN)
    own = ("model._target_=plain_net.HandsOn", "preview.guidance.sag=null", "model.note=a")
    arguments = ("experiment=digits", *own, *SHORT, "max_steps=1", "out=run")
    done = in_process("train", *arguments)
    assert done.code == 0, done.err
    config = sag_dit.load("run").description["model"]
    told = {"_target_": "plain_net.HandsOn", "note": "a", "in_channels": 1, "num_classes": 10}
    assert config == told


@pytest.mark.parametrize(
    ("stated", "told"),
    [("patch_size=2", "takes no patch_size"), ("size=XL", "takes no hidden_size or depth or num_")],
)
def test_sizes_that_a_class_does_not_take_are_refused(
    stated: str, told: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "plain_net.py").write_text(PLAIN)
    arguments = ["experiment=digits", "model._target_=plain_net.Plain"]
    assert refuse_foreign_sizes("train", arguments) == arguments
    assert refuse_foreign_sizes("train", ["model.depth=2", stated]) == ["model.depth=2", stated]
    with pytest.raises(SystemExit):
        refuse_foreign_sizes("train", [*arguments, stated])
    assert f"{stated}: plain_net.Plain {told}" in capsys.readouterr().err


def test_one_of_rectangles_is_trained(in_process: Command, files: Path) -> None:
    (files / "plain_net.py").write_text(PLAIN)
    for name in "ab":
        (files / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 16), (60 * number, 9, 9)).save(
                files / "photos" / name / f"{number}.png"
            )
    wide = ("experiment=folder", "data.root=photos", "resolution=[16,32]", "out=run")
    own = ("model._target_=plain_net.Wide", "preview.guidance.sag=null", "max_steps=1", *CPU)
    done = in_process("train", *wide, *own, "data.batch_size=4", "logger=none")
    assert done.code == 0, done.err
    refused = in_process("train", *wide, *own, "resolution=[32,16]", "out=other")
    assert refused.code == 1 and "expected (3, 32, 16), that of the data at" in refused.err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("model._target_=plain_net.Plain", "model.sid=8"), "takes no sid\nDid you mean side?"),
        (("model._target_=plain_net.Plain", "model.side=4"), "its x_t is (1, 4, 4): expected (1"),
        (("model._target_=plain_net.Forgets",), "its arguments lack it"),
        (("model._target_=plain_net.HandsOn", "model.sid=8"), "cannot be built"),
        (("model._target_=plain_net.Other",), "Other"),
        (("model._target_=plain_net.Narrow",), "its arguments hold class_dropout_prob, which its"),
        (("model._target_=torch.nn.Linear",), "expected a torch module that has the members of"),
        (("model._target_=plain_net.None_",), "plain_net"),
    ],
)
def test_what_is_no_network_is_told(
    changes: tuple[str, ...], told: str, in_process: Command, files: Path
) -> None:
    (files / "plain_net.py").write_text(PLAIN)
    done = in_process("train", "experiment=digits", *SHORT, *changes, "out=run")
    assert done.code == 1 and told in done.err and "Traceback" not in done.err, done.err
    assert not (files / "run").exists()


def test_a_config_builds_no_class_that_is_no_network(files: Path) -> None:
    rest = {"process": {"schedule": "linear"}, "kind": "eps", "x_0_range": None}
    for target in ("subprocess.Popen", "os.system", "torch.nn.Linear", "pathlib.Path"):
        with pytest.raises(ValueError, match=f"model._target_={target.split('.')[0]}"):
            build({"model": {"_target_": target, "args": "true"}, **rest})


def test_an_objective_of_ones_own(in_process: Command, files: Path) -> None:
    repa = ("experiment=digits", "model.depth=2", "objective._target_=my_repa.Repa", *SHORT)
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        done = in_process("train", *repa, f"max_steps={steps}", f"out={out}")
        assert done.code == 0, done.err
    states = [
        torch.load(files / out / "checkpoints" / "step-00000004.ckpt", weights_only=True)
        for out in ("whole", "parts")
    ]
    assert "objective.projector.0.weight" in states[0]["state_dict"]
    torch.testing.assert_close(states[1]["state_dict"], states[0]["state_dict"], rtol=0, atol=0)
    assert not any("projector" in n for n in load_file(files / "whole" / "model.safetensors"))
    done = in_process("sample", "ckpt=whole", *CPU, "num_images=1", "steps=2", "gallery.num=0")
    assert done.code == 0, done.err
    # Pixels and who sees them belong together.
    refused = in_process("train", *repa, "objective.weight=1", "out=whole")
    assert refused.code == 1 and "objective.weight" in refused.err


@pytest.mark.slow  # Two processes, twice.
def test_two_ranks_train_an_objectives_modules_alike(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied or sharded, the same weights: in the one gradients are added, in the other parts."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{files}")
    repa = ("experiment=digits", "model.depth=2", "objective._target_=my_repa.Repa")
    ranked = ("trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=16", "max_steps=4")
    sys_train = (sys.executable, "-m", "sag_dit", "train")
    for strategy in ("ddp", "fsdp"):
        done = subprocess.run(
            [*sys_train, *repa, *ranked, f"trainer={strategy}", f"out={strategy}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    ddp, fsdp = (load_file(files / each / "model.safetensors") for each in ("ddp", "fsdp"))
    torch.testing.assert_close(fsdp, ddp, rtol=0, atol=0)


def test_an_autoencoder_of_ones_own(
    in_process: Command, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(files / "photos", side=24)
    encode = ("data.root=photos", "data.size=16", "workers=0", "trainer.accelerator=cpu")
    own = ("vae._target_=my_vae.Shuffle", "vae.std=0.25")
    done = in_process("encode", *encode, *own, "out=latents")
    assert done.code == 0, done.err
    index = read_index(files / "latents")
    assert index.vae == {"_target_": "my_vae.Shuffle", "std": 0.25}
    assert index.shape == (12, 8, 8)
    # Of what was encoded, the pixels come back to the last bit.
    codec = find_codec(index.vae)
    crops = Crops(find_images(files / "photos"), 16)
    pixels = torch.stack([crops[i][0] for i in range(4)])
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)
    latents = ("data=latents", "data.root=latents", "data.workers=0", "resolution=16")
    train = ("experiment=digits", *latents, *SHORT, "data.batch_size=4", "model.depth=1")
    done = in_process("train", *train, *own, "out=run")
    assert done.code == 0, done.err
    other = in_process("train", *train, own[0], "vae.std=0.5", "out=other")
    assert other.code == 0  # The same encoder: only what its latents are divided by is another.
    forget(monkeypatch)
    draw = ("sample", "ckpt=run", *CPU, "num_images=1", "steps=2", "gallery.num=0", "sag_scale=0")
    refused = in_process(*draw)
    assert refused.code == 1 and "vae._target_=my_vae.Shuffle" in refused.err
    done = in_process(*draw, "imports=my_vae", "out=drawn")
    assert done.code == 0, done.err
    with Image.open(files / "drawn" / "images" / "000000.png") as image:
        assert image.size == (16, 16)
