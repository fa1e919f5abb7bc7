"""What changes speed or memory changes the result by rounding only: mixed precision, accumulated
gradients, recomputed and compiled blocks, a fused optimiser; and gradients are clipped as told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from sag_dit.data.digits import Digits
from sag_dit.denoiser.base import Condition, Denoiser
from sag_dit.models.dit.network import DiTBlock
from sag_dit.process import NoiseLevel
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import MSE
from sag_dit.training.objective import Losses as ObjectiveLosses
from sag_dit.training.resume import LastCheckpoints, newest_checkpoint
from tests.training.making import (
    ADAM,
    STEADY_ADAM,
    Losses,
    assert_same,
    fresh_model,
    make_trainer,
    state,
)

Fit = Callable[..., tuple[DiffusionModule, list[float]]]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Train a fresh model on digits and return it with its losses."""

    def run(
        steps: int = 3, batch_size: int = 8, prepare: Any = None, **options: Any
    ) -> tuple[DiffusionModule, list[float]]:
        module_options = {
            name: options.pop(name) for name in ("optimizer", "objective") if name in options
        }
        model = fresh_model(class_dropout_prob=options.pop("class_dropout_prob", 0.1))
        module = DiffusionModule(model, ema_decay=0.5, **{"optimizer": ADAM, **module_options})
        if prepare is not None:
            prepare(module)
        losses = Losses()
        callbacks = [losses, *options.pop("callbacks", ())]
        trainer = make_trainer(tmp_path, steps, callbacks, **options)
        trainer.fit(module, datamodule=Digits(batch_size))
        return module, losses.values

    return run


def assert_close(left: DiffusionModule, right: DiffusionModule, tolerance: float) -> None:
    torch.testing.assert_close(state(left), state(right), rtol=0, atol=tolerance)


def test_bf16_keeps_weights_average_and_moments_in_float32(fit: Fit) -> None:
    plain, losses = fit(optimizer=STEADY_ADAM)
    mixed, coarse = fit(precision="bf16-mixed", optimizer=STEADY_ADAM)
    assert coarse != losses
    assert coarse == pytest.approx(losses, rel=0.02)
    assert {tensor.dtype for tensor in mixed.state_dict().values() if tensor.ndim} == {
        torch.float32
    }
    moments = mixed.optimizers().optimizer.state_dict()["state"]  # type: ignore[union-attr]
    assert {each["exp_avg"].dtype for each in moments.values()} == {torch.float32}
    assert_close(mixed, plain, 0.005)  # the furthest weight has moved by 0.09


class Seen(Callback):
    """Keeps norms of gradients and scales of losses."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.scales: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.norms.append(float(pl_module.last_norm))  # type: ignore[arg-type]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())


STILL = partial(torch.optim.SGD, lr=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_skips_steps_that_overflow_and_sees_true_gradients(fit: Fit, fused: bool) -> None:
    """Also with a fused optimiser that clips: the norm logged is not that of scaled gradients."""
    watched, plain = Seen(), Seen()
    # Lightning itself refuses fp16 on a CPU, which torch has learned since.
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    adam = partial(ADAM, fused=fused)
    module, _ = fit(8, plugins=[half], callbacks=[watched], optimizer=adam, gradient_clip_val=1e3)
    skipped = module.skipped
    assert 0 < skipped < 8
    assert watched.scales == [2.0 ** (20 - min(step + 1, skipped)) for step in range(8)]
    assert not torch.tensor(watched.norms[:skipped]).isfinite().any()
    # Until then no weight has moved.
    fit(skipped + 1, callbacks=[plain], optimizer=STILL)
    assert watched.norms[skipped] == pytest.approx(plain.norms[skipped], rel=0.02)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


@dataclass(frozen=True)
class Still(MSE):
    """No randomness: half way through the process, and an image's noise is its mirror image."""

    def quantiles(self, count: int, device: torch.device) -> Tensor:
        return torch.full((count,), 0.5)

    def losses(
        self, denoiser: Denoiser, x_0: Tensor, cond: Condition, level: NoiseLevel, eps: Tensor
    ) -> ObjectiveLosses:
        return super().losses(denoiser, x_0, cond, level, x_0.flip(-1))


def test_accumulated_batches_are_one_batch(fit: Fit) -> None:
    options = {"objective": Still(), "class_dropout_prob": 0.0}
    options["optimizer"] = partial(torch.optim.SGD, lr=0.1)
    whole, losses = fit(3, 24, **options)
    parts, shares = fit(3, 8, accumulate_grad_batches=3, **options)
    assert len(shares) == 9
    assert_close(parts, whole, 1e-6)
    torch.testing.assert_close(parts.averaged.state_dict(), whole.averaged.state_dict())
    means = torch.tensor(shares).reshape(3, 3).sum(dim=1)  # Lightning has divided by three
    torch.testing.assert_close(means, torch.tensor(losses))
    assert not torch.equal(state(whole)["network.blocks.0.attn.qkv.weight"][0], torch.zeros(48))


def test_accumulating_runs_go_on_at_a_whole_step(tmp_path: Path) -> None:
    def train(out: Path, steps: int) -> DiffusionModule:
        module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.5)
        checkpoint, step = newest_checkpoint(out, module)
        losses = Losses()
        callbacks = [losses, LastCheckpoints(out, 2)]
        trainer = make_trainer(out, steps, callbacks, accumulate_grad_batches=3)
        trainer.fit(module, datamodule=Digits(8), ckpt_path=checkpoint, weights_only=True)
        assert len(losses.values) == 3 * (steps - step)
        return module

    whole = train(tmp_path / "whole", 5)
    train(tmp_path / "parts", 3)
    parts = train(tmp_path / "parts", 5)
    assert_same(dict(parts.state_dict()), dict(whole.state_dict()))
    names = [path.name for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())]
    assert names == ["step-00000004.ckpt", "step-00000005.ckpt"]


def test_gradients_are_clipped_and_their_norm_is_logged_before(fit: Fit) -> None:
    descent = partial(torch.optim.SGD, lr=1.0)
    start, _ = fit(1, optimizer=STILL)
    free, bound = Seen(), Seen()
    far, _ = fit(1, callbacks=[free], optimizer=descent)
    near, _ = fit(1, callbacks=[bound], optimizer=descent, gradient_clip_val=0.01)

    def moved(module: DiffusionModule) -> float:
        here, there = state(module), state(start)
        return float(torch.cat([(here[name] - there[name]).flatten() for name in here]).norm())

    assert free.norms == bound.norms
    assert moved(far) == pytest.approx(free.norms[0], rel=1e-4)
    assert moved(near) == pytest.approx(0.01, rel=1e-3)


def test_recomputed_blocks_change_no_bit(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = DiTBlock.forward, 0

    def counting(self: DiTBlock, *inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *inputs)

    monkeypatch.setattr(DiTBlock, "forward", counting)
    kept, losses = fit()
    assert calls == 3 * 2
    again, same_losses = fit(
        prepare=lambda module: setattr(module.denoiser.network, "checkpoint_blocks", True)
    )
    assert calls == 3 * 2 + 3 * 4, "every block is evaluated twice"
    assert same_losses == losses
    assert_same(state(again), state(kept))


def test_a_fused_optimiser_changes_rounding_only(fit: Fit) -> None:
    apart, losses = fit(5, optimizer=STEADY_ADAM)
    fused, same_losses = fit(5, optimizer=partial(STEADY_ADAM, fused=True))
    assert fused.optimizers().optimizer.defaults["fused"]  # type: ignore[union-attr]
    assert same_losses == pytest.approx(losses, rel=1e-5)
    assert_close(fused, apart, 1e-5)


def test_a_fused_optimiser_clips_under_mixed_precision(fit: Fit) -> None:
    fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module, losses = fit(precision="bf16-mixed", optimizer=fused, gradient_clip_val=1.0)
    assert len(losses) == 3 and module.skipped == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_compiled_blocks_change_rounding_only(fit: Fit) -> None:
    eager, losses = fit(optimizer=STEADY_ADAM)
    compiled, same_losses = fit(
        optimizer=STEADY_ADAM, prepare=lambda module: module.denoiser.network.compile_blocks()
    )
    assert all(block._compiled_call_impl for block in compiled.denoiser.network.blocks)
    assert same_losses == pytest.approx(losses, rel=1e-5)
    assert_close(compiled, eager, 1e-5)
