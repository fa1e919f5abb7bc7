"""``train.py experiment=finetune``: from a checkpoint to a run that draws other classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sag_dit.checkpoints import load
from sag_dit.cli import train
from sag_dit.cli.app import launch
from sag_dit.data.digits import Digits
from sag_dit.models.dit.adapter import TABLE

Command = Callable[..., Any]
SaveOfficial = Callable[..., Path]

QUICK = ("every_n_steps.checkpoint=2", "every_n_steps.log=1", "preview.steps=2")
OLD_CLASSES = "data.classes=[0,1,2,3,4,5,6,7]"
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LORA = ("lora.rank=3", "lora.alpha=6", "lora.dropout=0.1", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model of the digits 0 to 7, trained for a few steps."""
    folder = str(tmp_path_factory.mktemp("runs") / "base")
    small = ("model.hidden_size=48", "model.depth=2", "model.num_heads=3", "data.batch_size=16")
    command = ("experiment=digits", OLD_CLASSES, *small, *QUICK, "max_steps=4", f"out={folder}")
    with pytest.MonkeyPatch.context() as patch:
        # The command sets it itself; here it must not stay set for other tests.
        patch.setenv("HYDRA_FULL_ERROR", "1")
        launch("train", train.run_train, command)
    return folder


@pytest.fixture
def finetune(in_process: Command) -> Command:
    """``train.py experiment=finetune`` on digits, for four steps."""

    def run(*arguments: str) -> Any:
        return in_process(
            "train",
            "experiment=finetune",
            "data=digits",
            "data.batch_size=16",
            "max_steps=4",
            *QUICK,
            *arguments,
        )

    return run


def make_photos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_digits_that_the_model_has_not_seen(
    base: str, finetune: Command, in_process: Command
) -> None:
    arguments = (f"ckpt={base}", "data.classes=[8,9,0]", "freeze=[t_embedder,blocks.0.*]")
    outcome = finetune(*arguments, "out=tuned")
    assert outcome.code == 0, outcome.err
    assert "1 known (0), 2 new (8, 9)" in outcome.out
    config = json.loads(Path("tuned/config.json").read_text())
    before = json.loads(Path(base, "config.json").read_text())
    assert config["class_names"] == ["8", "9", "0"]
    assert {**config["model"], "num_classes": 8} == before["model"]
    assert (config["process"], config["kind"]) == (before["process"], before["kind"])

    old, new = load_file(f"{base}/model.safetensors"), load_file("tuned/model.safetensors")
    assert len(new["y_embedder.embedding_table.weight"]) == 4
    same = {n for n in new if new[n].shape == old[n].shape and torch.equal(new[n], old[n])}
    frozen = {n for n in new if n.startswith(("t_embedder.", "blocks.0."))} | {"pos_embed"}
    assert same == frozen

    drawn = in_process("sample", "ckpt=tuned", "steps=2", "num_images=2", "classes=['9']")
    assert drawn.code == 0, drawn.err
    assert len(list((drawn.folder() / "images").glob("*.png"))) == 2
    refused = in_process("sample", "ckpt=tuned", "steps=2", "num_images=2", "classes=['7']")
    assert refused.code == 1 and "7" in refused.err

    again = finetune(*arguments, "out=tuned")
    assert (again.code, again.evaluations) == (0, 0)
    torch.testing.assert_close(load_file("tuned/model.safetensors"), new, rtol=0, atol=0)


def test_no_step_leaves_the_checkpoint_as_it_is(base: str, finetune: Command) -> None:
    """The weights that training starts from are the averaged ones of the run's folder."""
    outcome = finetune(f"ckpt={base}", OLD_CLASSES, "optimizer.lr=0", "max_steps=1", "out=tuned")
    assert outcome.code == 0, outcome.err
    assert "re-made" not in outcome.out
    old, new = load_file(f"{base}/model.safetensors"), load_file("tuned/model.safetensors")
    torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_adapters_are_trained_resumed_merged_and_sampled(
    base: str, finetune: Command, in_process: Command
) -> None:
    arguments = (f"ckpt={base}", "data.classes=[8,9,0]", *LORA, "every_n_steps.preview=2")
    outcome = finetune(*arguments, "out=whole")
    assert outcome.code == 0, outcome.err
    added = 2 * 3 * (4 * 48 + 2 * 48 + 2 * 5 * 48)
    assert f"LoRA     {added:,} parameters added to blocks.*.attn.qkv (2), " in outcome.out
    assert f"trained  {added + 4 * 48:,} of" in outcome.out

    # Only what has an adapter has changed, and the labels; under plain names.
    old, new = load_file(f"{base}/model.safetensors"), load_file("whole/model.safetensors")
    adapted = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in LAYERS}
    assert {n for n in old if n not in new or not torch.equal(new[n], old[n])} == {*adapted, TABLE}
    assert "lora" not in json.loads(Path("whole/config.json").read_text())

    # A checkpoint in between says so, and is merged as the export is.
    checkpoint = Path("whole/checkpoints/step-00000004.ckpt")
    said = torch.load(checkpoint, weights_only=True)
    assert said["hyper_parameters"]["lora"] == {"rank": 3, "alpha": 6.0}
    assert len(said["optimizer_states"][0]["state"]) == 2 * len(adapted) + 1
    loaded = load(checkpoint).denoiser.network.state_dict()
    torch.testing.assert_close(dict(loaded), new, rtol=0, atol=0)
    raw = load(checkpoint, ema=False).denoiser.network.state_dict()
    assert {n for n in new if not torch.equal(new[n], raw[n])} == {*adapted, TABLE}

    for ckpt in (("ckpt=whole",), (f"ckpt={checkpoint}", "ema=false")):
        drawn = in_process("sample", *ckpt, "steps=2", "num_images=1", "classes=['9']")
        assert drawn.code == 0, drawn.err

    assert finetune(*arguments, "max_steps=2", "out=stopped").code == 0
    assert finetune(*arguments, "out=stopped").code == 0
    torch.testing.assert_close(load_file("stopped/model.safetensors"), new, rtol=0, atol=0)


def test_known_classes_keep_their_rows_beside_adapters(base: str, finetune: Command) -> None:
    outcome = finetune(f"ckpt={base}", OLD_CLASSES, *LORA, "freeze=[blocks.0]", "max_steps=1")
    assert outcome.code == 0, outcome.err
    assert "blocks.*.attn.qkv (1), blocks.*.attn.proj (1)" in outcome.out
    folder = outcome.out.splitlines()[-1].removeprefix("run: ")
    old, new = load_file(f"{base}/model.safetensors"), load_file(f"{folder}/model.safetensors")
    changed = {n for n in old if not torch.equal(new[n], old[n])}
    assert changed == {f"blocks.1.{layer}.weight" for layer in LAYERS}


@pytest.mark.slow
def test_adapters_of_sharded_and_copied_models(
    base: str, in_other_process: Command, tmp_path: Path
) -> None:
    """FSDP2 on two ranks against DDP: bit-equal; a rank of 3 does not divide by two."""
    command = ("experiment=finetune", "data=digits", "data.batch_size=16", "data.classes=[8,9]")
    command += (*QUICK, *LORA, f"ckpt={base}", "trainer.devices=2", "trainer.accelerator=cpu")
    weights = {}
    for strategy in ("ddp", "fsdp"):
        run = (f"trainer={strategy}", f"out={strategy}", "max_steps=4")
        outcome = in_other_process(*command, *run, script="train.py")
        assert outcome.code == 0, outcome.out + outcome.err
        weights[strategy] = load_file(tmp_path / strategy / "model.safetensors")
    torch.testing.assert_close(weights["fsdp"], weights["ddp"], rtol=0, atol=0)


def test_photos_at_another_resolution(tiny: Path, in_process: Command, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", "corgi", "tabby")
    outcome = in_process(
        "train",
        "experiment=finetune",
        f"ckpt={tiny}",
        f"data.root={photos}",
        "data.workers=0",
        "data.batch_size=4",
        "resolution=16",
        "max_steps=2",
        *QUICK,
    )
    assert outcome.code == 0, outcome.err
    assert "positions of 4 x 4 tokens: now 8 x 8" in outcome.out
    assert "data: 6 images in 2 classes\n  classes  corgi (3), tabby (3)\n" in outcome.out
    folder = outcome.out.splitlines()[-1].removeprefix("run: ")
    # DiT's objective, since the checkpoint learned its variance.
    assert "train/vlb" in next(Path(folder).rglob("metrics.csv")).read_text()
    drawn = in_process("sample", f"ckpt={folder}", "steps=2", "num_images=1", "classes=[corgi]")
    assert drawn.code == 0, drawn.err
    with Image.open(drawn.folder() / "images" / "000000.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "ckpt is not set"),
        (("ckpt={base}", "freeze=[block.0]"), "'block.0' matches no parameter"),
        (("ckpt={base}", "kind=eps"), "determines kind"),
        (("ckpt={base}", "process=flow"), "determines process"),
        (("ckpt={base}", "objective=flow"), "expected a Flow process"),
        (("ckpt={base}", "resolution=16"), "(1, 16, 16)"),
        (("ckpt={base}", "data.classes=[8,8]"), "classes=[8, 8]: expected different digits"),
        (("ckpt={tiny}",), "a model of (3, 8, 8)"),
        (("ckpt={base}", "lora.rank=3", "lora.targets=[attn]"), "'attn' matches no linear layer"),
        (("ckpt=missing.pt", "lora.rank=0"), "lora.rank=0: expected"),
        (("ckpt=missing.pt",), "missing.pt"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, base: str, tiny: Path, finetune: Command
) -> None:
    outcome = finetune(*(a.format(base=base, tiny=tiny) for a in arguments))
    assert outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("outputs").exists()


def test_photos_that_do_not_fit(
    save_official: SaveOfficial, in_process: Command, tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "photos", "corgi")
    grey = save_official(tmp_path / "grey.pt", in_channels=1)
    command = ("train", "experiment=finetune", f"ckpt={grey}", f"data.root={photos}")
    outcome = in_process(*command)
    assert outcome.code == 1 and "data.channels=3: expected 1" in outcome.err
    outcome = in_process(*command, "data.channels=1", "resolution=9")
    assert outcome.code == 1 and "resolution=9: expected a multiple of 2" in outcome.err


def test_a_fresh_recipe_takes_no_checkpoint(base: str, in_process: Command) -> None:
    outcome = in_process("train", "experiment=digits", f"ckpt={base}")
    assert outcome.code == 1
    assert "as in experiment=finetune" in outcome.err


def test_chosen_digits_are_labelled_in_their_order() -> None:
    data = Digits(batch_size=64, classes=[9, 2])
    assert data.class_names == ("9", "2")
    whole = list(Digits().val_dataloader())
    images, labels = (torch.cat(part) for part in zip(*whole, strict=True))
    chosen = list(data.val_dataloader())
    shown, numbers = (torch.cat(part) for part in zip(*chosen, strict=True))
    for label, digit in enumerate((9, 2)):
        assert torch.equal(shown[numbers == label], images[labels == digit])
    assert set(numbers.tolist()) == {0, 1}
    _, batch = next(iter(data.train_dataloader()))
    assert set(batch.tolist()) == {0, 1}
