"""What a run shows: its bar, speed, share of the peak, loss by level, gradients' norm, pictures."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from sag_dit.checkpoints import from_denoiser
from sag_dit.checkpoints.config import describe
from sag_dit.data.digits import Digits
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG
from sag_dit.models import DiT, dit
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, draw
from sag_dit.training import callbacks
from sag_dit.training.callbacks import BINS, LossByLevel, Previews, Speed, training_flops
from sag_dit.training.console import Progress
from sag_dit.training.loggers import CSVLog
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import Hybrid
from sag_dit.training.resume import LastCheckpoints, newest_checkpoint
from tests.training.making import ADAM, fresh_model, make_trainer


def module(**options: Any) -> DiffusionModule:
    return DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.5, **options)


class Each(Callback):
    """Calls a function at the end of every batch."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._function(trainer, pl_module, batch)


def test_operations_of_training_are_three_times_the_published_forward() -> None:
    """DiT-XL/2 at 256 pixels has 118.64 Gflops (table 4 of the paper), which counts products."""
    with torch.device("meta"):
        network = dit("DiT-XL/2")
    described: Any = SimpleNamespace(description=describe(ClassConditional(network, DDPM())))
    flops = training_flops(described)
    assert flops == pytest.approx(3 * 2 * 118.64e9, rel=0.005)


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the time by what is set."""
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("precision", "single"), [("32-true", 19.5e12), ("bf16-mixed", 312e12)])
def test_speed_and_share_of_the_peak(
    monkeypatch: pytest.MonkeyPatch, precision: str, single: float
) -> None:
    now = clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: 12_500_000_000)
    trained = module()
    logged: dict[str, float] = {}
    watched = SimpleNamespace(
        device=torch.device("cuda"), log=lambda name, value, **_: logged.update({name: value})
    )
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer: Any = SimpleNamespace(
        precision=precision, world_size=4, global_step=0, fit_loop=SimpleNamespace(epoch_loop=loop)
    )
    speed = Speed(every_n_steps=2)
    monkeypatch.setattr(callbacks, "DiffusionModule", SimpleNamespace)
    watched.model = trained.model
    speed.on_train_start(trainer, watched)
    batch = torch.zeros(8, 1, 8, 8), torch.zeros(8)
    for step in (1, 2):
        trainer.global_step, now[0] = step, now[0] + 3
        speed.on_validation_start(trainer, watched)
        now[0] += 1000  # is not counted
        speed.on_validation_end(trainer, watched)
        assert not logged
        speed.on_train_batch_end(trainer, watched, None, batch, step - 1)
    rate = 2 * 8 * 4 / 6
    peak = 4 * single
    assert logged == pytest.approx(
        {
            "images/s": rate,
            "mfu": rate * training_flops(trained.model) / peak,
            "memory_gb": 12.5,
        }
    )


def test_the_bar_spans_the_run_also_after_a_stop(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def look(trainer: Trainer, *_: Any) -> None:
        bar = trainer.progress_bar_callback.train_progress_bar
        seen.append({**bar.format_dict, "shown": str(bar)})

    def train(steps: int, module: DiffusionModule) -> None:
        checkpoint, _ = newest_checkpoint(tmp_path, module)
        callbacks = [Progress(), Speed(1), Each(look), LastCheckpoints(tmp_path, 3)]
        options = {
            "enable_progress_bar": True,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "logger": CSVLog(tmp_path),
        }
        trainer = make_trainer(tmp_path, steps, callbacks, **options)
        trainer.fit(module, datamodule=Digits(8), ckpt_path=checkpoint, weights_only=True)

    train(3, module())
    assert [(bar["n"], bar["total"]) for bar in seen] == [(n, 6) for n in range(1, 7)]
    assert "train/loss=" in seen[-1]["shown"] and "images/s=" in seen[-1]["shown"]
    seen.clear()
    train(5, module())
    assert [(bar["n"], bar["total"], bar["initial"]) for bar in seen] == [
        (n, 10, 6) for n in range(7, 11)
    ]
    # Time left follows from the batches since the stop: 3 of 4 are left after the first.
    first = seen[0]
    left = first["shown"].partition("<")[2].partition(",")[0]
    assert "?" not in left
    minutes, seconds = map(int, left.split(":"))
    assert 60 * minutes + seconds == pytest.approx(3 * first["elapsed"], abs=1)


def test_loss_by_level_and_norm_of_gradients(tmp_path: Path) -> None:
    """Both against what is computed here from the losses and gradients themselves."""
    found: dict[int, list[float]] = {part: [] for part in range(BINS)}
    logged: list[dict[str, float]] = []
    norms: list[float] = []

    def collect(trainer: Trainer, module: DiffusionModule, batch: Any) -> None:
        losses = module.last_losses
        for t, loss in zip(losses.level.t.tolist(), losses.per_image.tolist(), strict=True):
            found[int(t // 250)].append(loss)  # 1000 times in four parts
        logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    trained = module()
    callbacks = [LossByLevel(2), Each(collect), Norms()]
    log = CSVLog(tmp_path)
    options = {"logger": log, "log_every_n_steps": 1}
    make_trainer(tmp_path, 2, callbacks, **options).fit(trained, datamodule=Digits(64))
    assert "loss_by_level/1_of_4" not in logged[0]
    for part, values in found.items():
        name = f"loss_by_level/{part + 1}_of_4"
        assert logged[1][name] == pytest.approx(float(np.mean(values)), rel=1e-5)
    with (tmp_path / "logs" / "metrics.csv").open() as rows:
        written = [float(row["train/grad_norm"]) for row in csv.DictReader(rows)]
    assert written == pytest.approx(norms, rel=1e-5)


def test_what_is_logged_at_every_other_step_is_of_that_step(tmp_path: Path) -> None:
    """Also of a hybrid loss's parts, and of accumulated batches."""
    norms: list[float] = []
    parts: list[float] = []

    def collect(trainer: Trainer, module: DiffusionModule, batch: Any) -> None:
        assert module.last_losses is not None
        parts.append(float(module.last_losses.terms["vlb"].mean()))
        norms.append(float("nan") if module.last_norm is None else float(module.last_norm))

    torch.manual_seed(0)
    network = DiT(8, 2, 1, 48, 2, 3, num_classes=10, learn_sigma=True)
    model = from_denoiser(ClassConditional(network.train(), DDPM()), "small")
    trained = DiffusionModule(model, objective=Hybrid(), optimizer=ADAM)
    trainer = make_trainer(
        tmp_path,
        5,
        [Each(collect)],
        logger=CSVLog(tmp_path),
        log_every_n_steps=2,
        accumulate_grad_batches=3,
    )
    trainer.fit(trained, datamodule=Digits(8))
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    last = [3 * (int(row["step"]) + 1) - 1 for row in rows]
    means = [sum(parts[i - 2 : i + 1]) / 3 for i in last]
    assert [float(row["train/vlb"]) for row in rows] == pytest.approx(means)
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx(
        [norms[i] for i in last]
    )


def test_previews_show_the_average_unguided_above_guided(tmp_path: Path) -> None:
    term = CFG(scale=3.0)
    trained = module()
    previews = Previews(tmp_path, 2, [3, "7"], (term,), steps=3, seed=5)
    # Large steps, so that the average differs from the weights and guidance has an effect.
    trained._make_optimizer = partial(torch.optim.AdamW, lr=0.02)
    make_trainer(tmp_path, 3, [previews]).fit(trained, datamodule=Digits(8))
    (file,) = (tmp_path / "previews").iterdir()
    assert file.name == "step-00000002.png"
    assert trained.denoiser.training, "training goes on as it was"

    again = module()
    again._make_optimizer = trained._make_optimizer
    make_trainer(tmp_path, 2).fit(again, datamodule=Digits(8))
    drawn = {}
    for name, denoiser in (("average", again.evaluated), ("raw", again.denoiser)):
        denoiser.eval()
        model = replace(again.model, denoiser=denoiser)
        requests = [Request(i, 5, label, i) for i, label in enumerate((3, 7))]
        drawn[name] = [
            draw(model, requests, Settings(steps=3, batch_size=2, guidance=guidance))
            for guidance in ((), (term,))
        ]
    with Image.open(file) as picture:
        grid = np.asarray(picture.convert("L"))[::8, ::8]
    for row, images in enumerate(drawn["average"]):
        for column, image in enumerate(images):
            top, left = 1 + 9 * row, 1 + 9 * column
            np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], image[0].numpy())
    assert not torch.equal(drawn["average"][0], drawn["average"][1])
    assert not torch.equal(drawn["average"][0], drawn["raw"][0])
