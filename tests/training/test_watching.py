"""What a run tells: its start, its lines, rates and norms; nothing of it touches the training."""

from __future__ import annotations

import csv
from collections import Counter
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sag_dit.data.digits import Digits
from sag_dit.training import console
from sag_dit.training.callbacks import LossByLevel, Previews, RatesAndNorms, Speed, TrackMetrics
from sag_dit.training.console import Lines, Progress
from sag_dit.training.loggers import CSVLog
from sag_dit.training.module import DiffusionModule
from sag_dit.training.start import Memory, estimate_memory, parameters_by_part, start_report
from tests.training.making import ADAM, Losses, assert_same, fresh_model, make_trainer, state

STEPS = 4
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


def module(**options: Any) -> DiffusionModule:
    return DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.5, **options)


def watchers(folder: Path, every: int) -> list[Callback]:
    """All that a run watches itself by."""
    return [
        Speed(every),
        LossByLevel(every),
        RatesAndNorms(every),
        Previews(folder, every, [3], steps=2),
    ]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_watching_changes_no_weight_by_a_bit(tmp_path: Path) -> None:
    plain, watched = module(), module()
    make_trainer(tmp_path, STEPS).fit(plain, datamodule=Digits(8))
    trainer = make_trainer(
        tmp_path,
        STEPS,
        watchers(tmp_path, 1),
        logger=[CSVLog(tmp_path)],
        log_every_n_steps=1,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.loggers = [*trainer.loggers, Lines(trainer)]
    start_report(watched, trainer, 8, 0, 1000)
    trainer.fit(watched, datamodule=Digits(8))
    assert len(rows_of(tmp_path)) > STEPS
    assert_same(state(watched), state(plain))


def test_between_log_entries_no_number_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of a tensor is what waits for a device; watching adds none but where it logs."""
    reads: Counter[int] = Counter()
    running: list[Trainer] = []

    def counting(read: Any) -> Any:
        @wraps(read)
        def counted(*args: Any, **known: Any) -> Any:
            if running:
                reads[running[0].fit_loop.total_batch_idx] += 1
            return read(*args, **known)

        return counted

    for name in READS:
        monkeypatch.setattr(Tensor, name, counting(getattr(Tensor, name)))

    def train(callbacks: list[Callback], **options: Any) -> dict[int, int]:
        trainer = make_trainer(tmp_path, 9, callbacks, log_every_n_steps=4, **options)
        if options:
            trainer.loggers = [*trainer.loggers, Lines(trainer)]
        reads.clear()
        running[:] = [trainer]
        trainer.fit(module(), datamodule=Digits(8))
        running.clear()
        return dict(reads)

    plain = train([])
    watched = train(
        [*watchers(tmp_path, 4), Progress()],
        logger=[CSVLog(tmp_path)],
        enable_progress_bar=True,
    )
    # Steps 3 and 7 log and draw, and at the start of steps 0 and 4 the bar looks at what is there.
    assert {step: watched[step] for step in (1, 2, 5, 6)} == {
        step: plain[step] for step in (1, 2, 5, 6)
    }
    assert watched[3] > plain[3]


def test_rates_are_those_of_the_step_and_the_norm_is_that_of_all_weights(tmp_path: Path) -> None:
    norms: list[float] = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            weights = [p.flatten() for p in pl_module.denoiser.parameters() if p.requires_grad]
            norms.append(float(torch.cat(weights).detach().double().norm()))

    def two_groups(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        groups = [{"params": [first], "name": "first"}, {"params": rest, "lr": 2e-3}]
        return torch.optim.AdamW(groups, lr=1e-3)

    halved = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    trained = DiffusionModule(fresh_model(), optimizer=two_groups, schedule=halved)
    trainer = make_trainer(
        tmp_path, 4, [RatesAndNorms(2), Norms()], logger=CSVLog(tmp_path), log_every_n_steps=2
    )
    trainer.fit(trained, datamodule=Digits(8))
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 3]
    # Steps 2 and 4 are after one and three halvings.
    for name, rate in (("first", 1e-3), ("1", 2e-3)):
        found = [float(row[f"train/lr/{name}"]) for row in rows]
        assert found == pytest.approx([rate / 2, rate / 8], rel=1e-6)
    assert [float(row["train/weight_norm"]) for row in rows] == pytest.approx(
        [norms[1], norms[3]], rel=1e-4
    )


def test_the_rate_is_what_an_optimiser_that_warms_up_says(tmp_path: Path) -> None:
    class Warming(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            (group,) = self.param_groups
            group["scheduled_lr"] = group.get("scheduled_lr", 0.0) + 0.25
            return super().step(closure)

    trained = DiffusionModule(fresh_model(), optimizer=partial(Warming, lr=1.0))
    options: dict[str, Any] = {"logger": CSVLog(tmp_path), "log_every_n_steps": 1}
    make_trainer(tmp_path, 2, [RatesAndNorms(1)], **options).fit(trained, datamodule=Digits(8))
    assert [float(row["train/lr"]) for row in rows_of(tmp_path)] == [0.25, 0.5]


def test_the_loss_of_a_step_is_the_mean_over_its_batches(tmp_path: Path) -> None:
    losses = Losses()
    options: dict[str, Any] = {"logger": CSVLog(tmp_path), "log_every_n_steps": 1}
    options |= {"accumulate_grad_batches": 3}
    make_trainer(tmp_path, 2, [losses], **options).fit(module(), datamodule=Digits(8))
    logged = [float(row["train/loss"]) for row in rows_of(tmp_path)]
    # Lightning divides what it gives callbacks by the number of batches.
    expected = [sum(losses.values[:3]), sum(losses.values[3:])]
    assert len(losses.values) == 6 and logged == pytest.approx(expected, rel=1e-5)


def test_one_group_has_a_rate_without_a_number(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, 1, [RatesAndNorms(1)], logger=CSVLog(tmp_path), log_every_n_steps=1
    )
    trainer.fit(module(), datamodule=Digits(8))
    (row,) = rows_of(tmp_path)
    assert float(row["train/lr"]) == pytest.approx(ADAM.keywords["lr"])


class Other:
    """Stands for ranks: what another one adds."""

    world_size, is_global_zero = 2, True

    def __init__(self, sums: Tensor) -> None:
        self.strategy = SimpleNamespace(reduce=lambda own, reduce_op: own + sums)


def test_losses_by_level_are_those_of_all_ranks_also_after_a_stop() -> None:
    other = torch.tensor([[8.0, 0, 0, 1.0], [2.0, 0, 0, 1.0]])
    one = LossByLevel()
    one._trainer = Other(other)  # type: ignore[assignment]
    one._sums = torch.tensor([[1.0, 3.0, 0, 0], [1.0, 1.0, 0, 0]])
    kept = one.state_dict()["sums"]
    assert torch.equal(kept, torch.tensor([[9.0, 3.0, 0, 1.0], [3.0, 1.0, 0, 1.0]]))
    # One rank goes on with all of it, the others with none.
    for first in (True, False):
        again = LossByLevel()
        again._trainer = SimpleNamespace(is_global_zero=first)  # type: ignore[assignment]
        again.load_state_dict({"sums": kept})
        assert torch.equal(again._sums, kept if first else torch.zeros(2, 4))


def test_lines_come_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    trainer: Any = SimpleNamespace(global_step=0, max_steps=2000)
    lines = Lines(trainer)

    def log(step: int, seconds: float, **metrics: float) -> str:
        trainer.global_step, now[0] = step, 1000 + seconds
        lines.log_metrics({name.replace("_", "/"): value for name, value in metrics.items()})
        return capsys.readouterr().err

    assert log(500, 0, train_loss=0.5, images_s=1234.6) == (
        "step 500 of 2,000: loss 0.5000, 1,235 images/s\n"
    )
    assert log(550, 5, train_loss=0.5) == ""
    # 100 steps in 10 s leave 140 s for 1,400 steps.
    assert log(600, 10, train_loss=0.4, mfu=0.313) == (
        "step 600 of 2,000: loss 0.4000, MFU 31%, 2 min left\n"
    )
    assert log(600, 11, val_loss=0.25) == "step 600 of 2,000: val/loss 0.25\n"
    assert log(2000, 12, train_loss=0.1) == "step 2,000 of 2,000: loss 0.1000\n"


def test_the_start_tells_parts_steps_and_where_it_goes_on(tmp_path: Path) -> None:
    trained = module()
    trainer = make_trainer(tmp_path, 100, accumulate_grad_batches=2)
    told = start_report(trained, trainer, images=16, step=40, epoch=320).splitlines()
    network = trained.model.class_conditional.network
    total = sum(p.numel() for p in network.parameters())
    assert told[0].startswith(f"model: DiT, {total:,} parameters, ")
    counts = parameters_by_part(network)
    assert sum(counts.values()) == total and f"blocks {counts['blocks']:,}" in told[1]
    assert told[2] == ("steps: 100 of 32 images on 1 device, 3,200 images in all: 10.0 epochs")
    assert told[3].startswith("memory: about ") and " of 16 images " in told[3]
    assert told[4] == "going on from step 40 of 100"


def kept_by(trained: DiffusionModule, images: int) -> int:
    """The bytes that a real forward pass keeps."""
    own = {p.untyped_storage().data_ptr() for p in trained.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in trained.buffers()}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    x_0, labels = torch.zeros(images, 1, 8, 8), torch.zeros(images, dtype=torch.long)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        trained.losses(trained.denoiser, (x_0, labels))
    return sum(storage.nbytes() for storage in found.values())


def test_the_estimate_of_memory_is_what_a_step_holds(tmp_path: Path) -> None:
    trained = module()
    before = torch.get_rng_state()
    memory = estimate_memory(trained, 32, make_trainer(tmp_path, 1)).parts
    assert torch.equal(torch.get_rng_state(), before)
    parameters = [p for p in trained.denoiser.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in parameters)
    assert memory["gradients"] == weights
    # AdamW's two numbers for each weight, and a count for each parameter.
    assert memory["optimiser"] == 2 * weights + 4 * len(parameters)
    assert memory["activations of 32 images"] == pytest.approx(kept_by(trained, 32), rel=0.1)
    half = estimate_memory(trained, 32, make_trainer(tmp_path, 1, precision="bf16-mixed")).parts
    assert half["activations of 32 images"] == memory["activations of 32 images"] // 2  # type: ignore[operator]


def test_recomputed_blocks_take_less(tmp_path: Path) -> None:
    trained, name = module(), "activations of 32 images"
    whole = estimate_memory(trained, 32, make_trainer(tmp_path, 1)).parts[name]
    trained.model.class_conditional.network.checkpoint_blocks = True
    less = estimate_memory(trained, 32, make_trainer(tmp_path, 1)).parts[name]
    assert whole and less and kept_by(trained, 32) < less < 0.7 * whole


def test_what_cannot_be_counted_is_told(tmp_path: Path) -> None:
    def reads(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: float(torch.zeros(1, device="meta")))
        return optimizer

    trained = DiffusionModule(fresh_model(), optimizer=reads)
    memory = estimate_memory(trained, 4, make_trainer(tmp_path, 1))
    assert memory.parts["optimiser"] is None
    assert memory.told("cuda:0").endswith("; beside it optimiser, which is not known")
    few = Memory({"weights": 3_000_000_000}).told("cuda:0", there=2_000_000_000)
    assert "about 3 GB on cuda:0 of 2 GB" in few and "warning: more than there is" in few


class Pictures(Logger):
    """A logger of somebody's that takes pictures as Lightning's do."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.seen.append((key, len(images), step))


def test_previews_go_to_loggers_that_take_pictures(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    own, board = Pictures(), TensorBoardLogger(tmp_path, name="logs", version="")
    previews = Previews(tmp_path, 2, [3, 7], steps=2)
    make_trainer(tmp_path, 3, [previews], logger=[own, board]).fit(module(), datamodule=Digits(8))
    assert own.seen == [("previews", 1, 1)]
    log = reading.EventAccumulator(str(tmp_path / "logs")).Reload()
    (event,) = log.Images("previews")
    assert (event.step, event.height) == (1, 1 + 2 * 9)


def test_a_metric_of_the_last_step_stays_when_a_run_goes_on(tmp_path: Path) -> None:
    class Fixed(TrackMetrics):
        def __init__(self) -> None:
            self._every = 2

        def measure(self, trainer: Trainer, module: DiffusionModule) -> dict[str, float]:
            return {"fid": 3.0}

    log = CSVLog(tmp_path)
    make_trainer(tmp_path, 2, [Fixed()], logger=log).fit(module(), datamodule=Digits(8))
    CSVLog(tmp_path, first_step=2).log_metrics({"train/loss": 1.0}, step=2)
    assert [row["step"] for row in rows_of(tmp_path) if row["metrics/fid"]] == ["1"]


def test_drawing_is_no_part_of_the_speed() -> None:
    trained: LightningModule = module()
    assert isinstance(trained, DiffusionModule)
    with trained.model_to_draw_with():
        sum(range(10_000))
    assert trained.seconds_drawing > 0
