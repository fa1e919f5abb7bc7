"""A network whose label of no class is never trained is told of, and no other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.checkpoints import from_denoiser
from sag_dit.data.digits import Digits
from sag_dit.denoiser import ClassConditional
from sag_dit.models import Backbone
from sag_dit.process import DDPM
from sag_dit.training import null_row
from sag_dit.training.module import DiffusionModule
from tests.training.making import make_trainer


class Labelled(Backbone):
    """A level for each class; ``drops`` is the share of labels that its forward drops."""

    drops, row = 0.0, True

    def __init__(self, input_size: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.input_size, self.in_channels = (input_size, input_size), in_channels
        self.num_classes = self.null_label = num_classes
        self.scale = nn.Conv2d(1, 1, 1)
        self.label = self.table(num_classes)
        self.gate = nn.Parameter(torch.zeros(1))  # At first no label has a gradient.

    def table(self, num_classes: int) -> Any:
        return nn.Embedding(num_classes + 1, 1)

    def level(self, y: Tensor) -> Any:
        return self.label(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = self.level(self.drop_labels(y, self.drops))
        out: Tensor = self.scale(x) + (self.gate * level)[..., None, None]
        return out


class Dropping(Labelled):
    drops = 0.1


class OneHot(Labelled):
    def table(self, num_classes: int) -> Any:
        return nn.Linear(num_classes + 1, 1)

    def level(self, y: Tensor) -> Any:
        return self.label(nn.functional.one_hot(y, self.num_classes + 1).float())


class DroppingOneHot(OneHot):
    drops = 0.1


class Padded(Labelled):
    """Its 'no class' is zero, and stays so."""

    drops = 0.1

    def table(self, num_classes: int) -> Any:
        return nn.Embedding(num_classes + 1, 1, padding_idx=num_classes)


class Masked(Labelled):
    """Has 'no class' beside its classes, not among them."""

    def table(self, num_classes: int) -> Any:
        self.none = nn.Parameter(torch.zeros(1))
        return nn.Embedding(num_classes, 1)

    def level(self, y: Tensor) -> Any:
        none = (y == self.null_label) | (self.training & (torch.rand(y.shape) < 0.1))
        return torch.where(none[:, None], self.none, self.label(y.clamp(max=self.num_classes - 1)))


class Without(Labelled):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.null_label = None

    def level(self, y: Tensor) -> Any:
        return self.label(y)

    def drop_labels(self, y: Tensor, share: float = 0.1) -> Tensor:
        return y


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (Labelled, "label.weight"),
        (OneHot, "label.weight"),
        (Dropping, None),
        (DroppingOneHot, None),
        (Padded, None),
        (Masked, None),
        (Without, None),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_row_that_is_never_trained_is_told_once(
    kind: type[Labelled],
    table: str | None,
    accumulated: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(null_row, "STEPS", 6)
    monkeypatch.setattr(null_row, "IMAGES", 6 * 64 * accumulated)
    network = kind(8, 1, 10)
    model = from_denoiser(ClassConditional(network, DDPM(), x_0_range=(-1, 1)), "mine")
    adam = partial(torch.optim.AdamW, lr=1e-2)
    module = DiffusionModule(model, optimizer=adam, ema_decay=0.9)
    trainer = make_trainer(tmp_path, 9, accumulate_grad_batches=accumulated)
    trainer.fit(module, Digits(batch_size=64))
    told = [each.getMessage() for each in caplog.records if "null_label" in each.getMessage()]
    if table is None:
        assert not told
        return
    images = 6 * 64 * accumulated
    first = (
        f"{kind.__module__}.{kind.__name__}: row 10 (its null_label) of {table} has had no "
        f"gradient in 6 steps of {images:,} images"
    )
    assert len(told) == 1 and told[0].startswith(first) and "Backbone.drop_labels" in told[0]


def test_nothing_is_told_before_it_is_sure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = from_denoiser(ClassConditional(Labelled(8, 1, 10), DDPM(), x_0_range=(-1, 1)), "mine")
    module = DiffusionModule(model, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    make_trainer(tmp_path, 3).fit(module, Digits(batch_size=64))
    assert "null_label" not in caplog.text


def test_labels_are_dropped_in_training_alone() -> None:
    network = Labelled(8, 1, 10)
    y = torch.arange(10).repeat(200)
    assert torch.equal(network.eval().drop_labels(y), y)
    dropped = (network.train().drop_labels(y, 0.25) == 10).float().mean()
    assert 0.2 < dropped < 0.3
    network.null_label = None
    with pytest.raises(ValueError, match="Labelled: null_label=None, and its forward drops labels"):
        network.drop_labels(y)
