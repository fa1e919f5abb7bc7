"""Further averages beside the main one, and which checkpoints and snapshots of a run stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.checkpoints import averages, load
from sag_dit.checkpoints.averages import combination, kept_of_average
from sag_dit.data.digits import Digits
from sag_dit.training import resume
from sag_dit.training.averaging import Further, Snapshots, kept_steps, power_average
from sag_dit.training.module import DiffusionModule
from sag_dit.training.resume import LastCheckpoints, best_checkpoint, newest_checkpoint
from tests.closeness import assert_near
from tests.training.making import ADAM, assert_same, fresh_model, make_trainer

FURTHER = Further(decays=[0.9], sigma_rel=[0.05, 0.1])
ROOT = Path(__file__).parents[2]


def train(out: Path, steps: int, *callbacks: Any, **options: Any) -> DiffusionModule:
    """Train, going on from what is there, with a snapshot and a checkpoint at every step."""
    further = options.pop("further", FURTHER)
    most, every = options.pop("most", 100), options.pop("every", 1)
    module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.5, further=further)
    checkpoint, _ = newest_checkpoint(out, module)
    last = options.pop("last", LastCheckpoints(out, every))
    trainer = make_trainer(out, steps, [*callbacks, Snapshots(out, every, most), last], **options)
    trainer.fit(module, datamodule=Digits(8), ckpt_path=checkpoint, weights_only=True)
    return module


def files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}


def test_each_further_average_is_what_its_equation_says(tmp_path: Path) -> None:
    """Computed anew from the weights after each step; and neither changes the run itself."""
    walk: list[dict[str, Tensor]] = []
    step = DiffusionModule.optimizer_step

    def recording(self: DiffusionModule, *args: Any, **known: Any) -> None:
        step(self, *args, **known)
        walk.append({n: t.clone() for n, t in self.denoiser.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionModule, "optimizer_step", recording)
        module = train(tmp_path / "run", 5)
    plain = train(tmp_path / "plain", 5, further=None)
    assert_same(dict(plain.denoiser.state_dict()), dict(module.denoiser.state_dict()))
    assert plain.averaged is not None and module.averaged is not None
    assert_same(dict(plain.averaged.state_dict()), dict(module.averaged.state_dict()))
    assert not any(name.startswith("further") for name in plain.state_dict())
    for number in FURTHER.all:
        found = module.further[averages.place(number)].module.state_dict()
        for name, tensor in found.items():
            mean = walk[0][name]
            for update, weights in enumerate(walk[1:], start=2):
                keep = number if number > 0.5 else kept_of_average(number, update)
                mean = keep * mean + (1 - keep) * weights[name]
            assert_near(tensor, mean, 1e-5)


def test_a_run_that_is_cut_off_while_it_writes_an_average_ends_with_the_same_files(
    tmp_path: Path,
) -> None:
    """Killed in the middle of the second average's file of the third step, and started again."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from sag_dit.training import averaging
        from tests.training.test_averaging import train

        save, calls = averaging.save_file, []

        def cut(state, file, **known):
            calls.append(file)
            if len(calls) == 6:
                Path(file).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, file, **known)

        averaging.save_file = cut
        train(Path(sys.argv[1]), 6, most=3)
    """
    out, whole = tmp_path / "run", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", BOOT + textwrap.dedent(script), str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest, *_ = resume.steps_of(out / "checkpoints")
    assert newest.name == "step-00000002.ckpt"
    assert any(each.suffix == ".tmp" for each in (out / "averages").iterdir())
    left, right = train(out, 6, most=3), train(whole, 6, most=3)
    assert_same(dict(left.state_dict()), dict(right.state_dict()))
    assert files(out / "averages") == files(whole / "averages")
    assert sorted({averages.step_of(Path(name)) for name in files(whole / "averages")}) == [2, 4, 6]


BOOT = """
import sys, types
tests = types.ModuleType("tests"); tests.__path__ = ["tests"]; sys.modules["tests"] = tests
"""
"""Another package may be called tests too."""


@pytest.mark.parametrize("most", [2, 3, 7])
def test_snapshots_that_stay_follow_from_the_step_and_are_no_more_than_that(most: int) -> None:
    """Whichever were thinned out before, also by a run that went on from an earlier step."""
    there: set[int] = set()
    for step in range(1, 200):
        there = kept_steps(there | {step}, step, 1, most) & (there | {step})
        assert len(there) <= most and step in there
        gaps = [b - a for a, b in pairwise(sorted(there)[:-1])]
        assert max(gaps, default=0) <= 2 * step / (most - 1)
        # Back to two thirds, and on again: the same as if it had never been.
        back = {each for each in there if each <= 2 * step // 3}
        for again in range(2 * step // 3 + 1, step + 1):
            back = kept_steps(back | {again}, again, 1, most) & (back | {again})
        assert back == there


def test_averages_are_chosen_by_their_number(tmp_path: Path) -> None:
    out = tmp_path / "run"
    module = train(out, 6)
    networks = {
        number: dict(module.further[averages.place(number)].module.network.state_dict())
        for number in FURTHER.all
    }

    def found(ema: Any, place: Path = out) -> dict[str, Tensor]:
        return dict(load(place, ema=ema).class_conditional.network.state_dict())

    for number, network in networks.items():
        assert_same(found(number), network)
        assert load(out, ema=number).config["weights"] == f"ema {number}"
    # One that was not kept, of the last step and of an earlier one, also from snapshots alone.
    between = found(0.07)
    snapshots = averages.snapshots_in(out / "averages")
    weights = combination(
        [s.taken.updates for s in snapshots], [s.taken.sigma_rel for s in snapshots], 6, 0.07
    ).weights
    name = "blocks.0.attn.qkv.weight"
    tensors = [load_file(s.file)[name].double() for s in snapshots]
    expected = sum(w * t for w, t in zip(weights.tolist(), tensors, strict=True))
    assert_near(between[name], torch.as_tensor(expected).float(), 1e-5)
    newest, before = resume.steps_of(out / "checkpoints")
    assert_same(found(0.07, newest), between)
    earlier = found(0.07, before)
    assert not torch.equal(earlier[name], between[name])
    newest.unlink()
    before.unlink()
    assert_near(found(0.07)[name], between[name], 1e-5)
    # A snapshot is a model by itself.
    assert_same(found(True, snapshots[-1].file), found(snapshots[-1].taken.sigma_rel))
    for number, told in ((0.8, "a decay"), (0.9, "a decay")):
        with pytest.raises(ValueError, match=f"ema={number}: .*no such average, {told}; .*0.05, 0"):
            load(out, ema=number)
    with pytest.raises(ValueError, match=r"ema=0\.05: .*no such average, a sigma_rel; .* none"):
        load("digits", ema=0.05)


def test_few_snapshots_that_do_not_tell_an_average_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(out, 4, every=2, further=Further(sigma_rel=[0.05]))
    load(out, ema=0.05)
    assert "roughly" not in caplog.text
    load(out, ema=0.25)
    assert "ema=0.25 is told only roughly" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"decays": [0.2]}, "ema.further.decays=0.2: expected 0.2887"),
        ({"sigma_rel": [0.3]}, "ema.further.sigma_rel=0.3: expected"),
        ({"sigma_rel": [0.05, 0.05]}, "0.05 comes twice"),
    ],
)
def test_bad_averages(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Further(**wrong)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_rel=0\.29: expected"):
        power_average(0.29)


def kept(out: Path) -> list[str]:
    return sorted(each.stem for each in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_last_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    out = tmp_path / "run"
    train(out, 5, last=LastCheckpoints(out, 1, keep))
    assert kept(out) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_checkpoints_by_the_clock_come_beside_those_by_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes a step, and a checkpoint after 25 since the last, or at every fourth step."""
    out, now = tmp_path / "run", 0.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    saved: list[int] = []
    save = Trainer.save_checkpoint

    def recording(self: Trainer, *args: Any, **known: Any) -> None:
        saved.append(self.global_step)
        save(self, *args, **known)

    monkeypatch.setattr(Trainer, "save_checkpoint", recording)
    last = LastCheckpoints(out, 4, every_n_minutes=25)

    class Clock(DiffusionModule):
        def on_train_batch_start(self, *_: Any) -> None:
            nonlocal now
            now += 600

    module = Clock(fresh_model(), optimizer=ADAM)
    trainer = make_trainer(out, 9, [last])
    trainer.fit(module, datamodule=Digits(8))
    assert saved == [3, 4, 7, 8, 9]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_so_many_best_checkpoints_stay_also_where_fewer_are_wanted_later(tmp_path: Path) -> None:
    out, often = tmp_path / "run", {"val_check_interval": 1, "check_val_every_n_epoch": None}
    options = {"limit_val_batches": 1, **often, "further": None}
    train(out, 4, best_checkpoint(out, most=3), **options)
    best = [name for name in kept(out) if name.startswith("best")]
    assert len(best) == 3
    scores = {}
    state = torch.load(out / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    for each in state["callbacks"].values():
        scores |= each.get("best_k_models", {}) if isinstance(each, dict) else {}
    assert len(scores) == 3
    train(out, 5, best_checkpoint(out, most=1), **options)
    (only,) = [name for name in kept(out) if name.startswith("best")]
    best_before = min(scores, key=lambda path: float(scores[path]))
    assert only in ("best-00000005", Path(best_before).stem)
