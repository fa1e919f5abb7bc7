"""Steps whose gradients are not finite are skipped and counted, and stop a run that is lost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.data.digits import CLASS_NAMES, Digits
from sag_dit.denoiser import ClassConditional
from sag_dit.denoiser.base import Condition, Denoiser
from sag_dit.models import DiT
from sag_dit.process import DDPM, NoiseLevel
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import MSE, Losses


@dataclass(frozen=True)
class Broken(MSE):
    """The loss is NaN at the given calls."""

    at: frozenset[int] = frozenset()
    calls: list[int] = field(default_factory=list)

    def losses(
        self, denoiser: Denoiser, x_0: Tensor, cond: Condition, level: NoiseLevel, eps: Tensor
    ) -> Losses:
        losses = super().losses(denoiser, x_0, cond, level, eps)
        self.calls.append(len(self.calls))
        broken = torch.nan if self.calls[-1] in self.at else 1.0
        return replace(losses, per_image=losses.per_image * broken)


def small() -> Model:
    torch.manual_seed(0)
    network = DiT(8, 2, 1, 48, 2, 3, num_classes=10, learn_sigma=False)
    denoiser = ClassConditional(network, DDPM(), x_0_range=(-1, 1), class_names=CLASS_NAMES)
    return from_denoiser(denoiser.train(), "small")


def trained(at: set[int], steps: int, tmp_path: Path, max_skipped: int = 3) -> DiffusionModule:
    module = DiffusionModule(
        small(),
        objective=Broken(at=frozenset(at)),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        ema_decay=0.5,
        max_skipped=max_skipped,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(module, datamodule=Digits(16))
    return module


def test_a_step_without_finite_gradients_changes_nothing(tmp_path: Path) -> None:
    """Neither weights (not even by decay), nor their average, nor the optimiser's moments."""
    before, after = trained(set(), 2, tmp_path), trained({2, 3}, 4, tmp_path)
    assert (before.skipped, after.skipped) == (0, 2)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    first, second = (
        module.optimizers().optimizer.state_dict()["state"]  # type: ignore[union-attr]
        for module in (before, after)
    )
    assert all(torch.equal(first[i]["exp_avg"], second[i]["exp_avg"]) for i in first)


def test_training_goes_on_after_it(tmp_path: Path) -> None:
    module = trained({1}, 3, tmp_path)
    assert module.skipped == 1
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_too_many_in_a_row_stop_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 steps in a row are not finite.*optimizer\.lr"):
        trained({1, 2, 3}, 6, tmp_path)
    assert trained({1, 2, 4, 5}, 6, tmp_path).skipped == 4


def test_a_run_that_is_lost_from_the_start_is_told_of_the_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"first 3 steps are not finite: DiT, .*detect_anomaly"):
        trained({0, 1, 2}, 6, tmp_path)
