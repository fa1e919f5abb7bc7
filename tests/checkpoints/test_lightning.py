"""Lightning checkpoints with averaged weights, and the folders of runs."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.checkpoints import from_denoiser, load, write_safetensors
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from tests.checkpoints.conftest import Same


def train(denoiser: ClassConditional, folder: Path, averaged: bool = True) -> Path:
    """Take two steps with Lightning's own Trainer and averaging; return the checkpoint's path."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = denoiser
            self.other = torch.nn.Linear(2, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            labels = torch.zeros(len(batch), dtype=torch.long)
            return self.denoiser(batch, DDPM().level(500), labels).v.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.denoiser.parameters(), lr=1e-3)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["hyper_parameters"] = from_denoiser(
                denoiser, "x", defaults={"batch_size": 4}
            ).description

    keep = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        callbacks=[keep, *([EMAWeightAveraging(decay=0.5)] if averaged else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    data = torch.randn(8, 4, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    trainer.fit(Module().train(), torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return folder / "last.ckpt"


@pytest.fixture
def trainable(pixel_dit: DiT) -> ClassConditional:
    """A pixel model with names for its classes."""
    network = pixel_dit.requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    names = [f"digit {i}" for i in range(10)]
    return ClassConditional(network, DDPM(), x_0_range=(-1, 1), class_names=names)


@pytest.fixture
def run(trainable: ClassConditional, tmp_path: Path) -> Path:
    """A run's folder with its last checkpoint."""
    folder = tmp_path / "digits-1f3a"
    torch.manual_seed(0)
    train(trainable, folder / "checkpoints")
    (folder / "config.yaml").write_text("name: digits\n")
    return folder


def test_averaged_and_raw_weights_are_told_apart(run: Path, same: Same) -> None:
    last = run / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    for ema, key in ((True, "state_dict"), (False, "current_model_state")):
        network = load(last, ema=ema).denoiser.network.state_dict()
        assert network and all(
            torch.equal(value, stored[key][f"denoiser.network.{name}"])
            for name, value in network.items()
        )
    averaged, raw = load(last), load(last, ema=False)
    assert not same(averaged.denoiser.network, raw.denoiser.network)
    assert averaged.config["weights"] == "ema" and raw.config["weights"] == "raw"


def test_run_is_named_after_its_folder_and_described_by_itself(run: Path) -> None:
    for path in (run, run / "checkpoints" / "last.ckpt"):
        model = load(path)
        assert model.name == "digits-1f3a"
        assert model.class_names[3] == "digit 3"
        assert model.batch_size == 4
        assert model.config["model"]["num_heads"] == 2


def test_export_is_a_runs_end_unless_the_run_went_on(run: Path, ema_dit: DiT, same: Same) -> None:
    last = run / "checkpoints" / "last.ckpt"
    denoiser = ClassConditional(ema_dit, DDPM(), x_0_range=(-1, 1))
    exported = write_safetensors(run, denoiser)
    os.utime(last, ns=(0, 0))
    assert same(load(run).denoiser.network, ema_dit)
    assert load(run, ema=False).config["weights"] == "raw"
    os.utime(exported, ns=(0, 0))
    os.utime(last)
    assert not same(load(run).denoiser.network, ema_dit)
    last.rename(last.with_name("best-00000001.ckpt"))
    assert same(load(run).denoiser.network, ema_dit)


def test_run_without_averaging_says_so(
    trainable: ClassConditional, tmp_path: Path, same: Same
) -> None:
    last = train(trainable, tmp_path / "plain", averaged=False)
    assert same(load(last, ema=False).denoiser.network, trainable.network.eval())
    with pytest.raises(ValueError, match=r"ema=true: .*last\.ckpt holds no averaged.*ema=false"):
        load(last)


def test_checkpoint_without_description_is_read_from_its_weights(
    run: Path, tmp_path: Path, same: Same
) -> None:
    last = run / "checkpoints" / "last.ckpt"
    value = torch.load(last, weights_only=True)
    for said in (None, {"model": "DiT", "lr": 0.1}, Namespace(model="DiT")):
        torch.save({**value, "hyper_parameters": said}, tmp_path / "bare.ckpt")
        assert same(load(tmp_path / "bare.ckpt").denoiser.network, load(last).denoiser.network)


def test_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    state = {"encoder.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "current_model_state": state}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt: not a DiT: .*found encoder\.weight"):
        load(tmp_path / "other.ckpt")
