"""Small models, requests and runs of train.py for the tests of a device."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import randomise
from sag_dit.checkpoints import Model
from sag_dit.cli import train
from sag_dit.cli.composing import compose
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, trajectory


def random_model(device: str) -> Model:
    """A small pixel model with random weights."""
    torch.manual_seed(0)
    network = DiT(16, 2, 3, 96, 4, 4, num_classes=10)
    randomise(network)
    denoiser = ClassConditional(network, DDPM(), x_0_range=(-1, 1)).to(device).eval()
    return Model(denoiser, IdentityCodec(), "small", "", {}, denoiser.class_names)


def requests(count: int) -> list[Request]:
    """Images of classes 0, 1, 2, ..., each with its own noise."""
    return [Request(index, 0, index % 10, index) for index in range(count)]


def last_x(model: Model, asked: Sequence[Request], settings: Settings) -> Tensor:
    """Draw, and return x_0 before it is rounded to pixels."""
    with torch.no_grad():
        *_, last = trajectory(model, asked, settings)
    return last.x


def differences(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Return the greatest and the mean difference of two sets of images."""
    apart = (left.cpu().float() - right.cpu().float()).abs()
    return float(apart.max()), float(apart.mean())


def train_digits(out: Path, device: str, steps: int, *arguments: str) -> list[float]:
    """Run train.py on the digits in this process, and return the loss of every step it logged."""
    train.run_train(
        compose(
            "train",
            [
                "experiment=digits",
                "model.depth=2",
                f"trainer.accelerator={device}",
                "trainer.devices=1",
                "trainer.enable_progress_bar=false",
                "every_n_steps.log=1",
                f"max_steps={steps}",
                f"out={out}",
                *arguments,
            ],
        )
    )
    with (out / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def saved(out: Path) -> dict[str, Tensor]:
    """Everything that the newest checkpoint of a run holds of weights and optimiser."""
    newest = max((out / "checkpoints").glob("step-*.ckpt"))
    checkpoint = torch.load(newest, weights_only=True, map_location="cpu")
    moments = checkpoint["optimizer_states"][0]["state"]
    return {
        **checkpoint["state_dict"],
        **{f"{i}.{name}": value for i, each in moments.items() for name, value in each.items()},
    }


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the greatest difference of two sets of tensors of the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
