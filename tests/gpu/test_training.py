"""Runs of train.py on one device: they go on as if never stopped, also sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.gpu.conftest import Stated
from tests.gpu.making import furthest, saved, train_digits

pytestmark = pytest.mark.gpu

OFTEN = "every_n_steps.checkpoint=4"


@pytest.mark.parametrize(
    ("name", "arguments", "bound"),
    [
        ("as it is", (), 5e-3),
        ("deterministic", ("+trainer.deterministic=true",), 0),
        ("bf16-mixed", ("trainer.precision=bf16-mixed",), 5e-3),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    device: str, stated: Stated, tmp_path: Path, name: str, arguments: tuple[str, ...], bound: float
) -> None:
    """Weights, average and moments after 8 steps, and after 4 and 4 more."""
    options = (OFTEN, *arguments)
    whole = train_digits(tmp_path / "whole", device, 8, *options)
    train_digits(tmp_path / "again", device, 8, *options)
    train_digits(tmp_path / "parts", device, 4, *options)
    half = furthest(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert half > 0, "the second half of the run changes nothing"
    assert len(train_digits(tmp_path / "parts", device, 8, *options)) == len(whole) == 8
    expected = saved(tmp_path / "whole")
    repeated = furthest(saved(tmp_path / "again"), expected)
    stated(f"training, {name}: greatest difference of a repeated run", repeated, bound)
    resumed = furthest(saved(tmp_path / "parts"), expected)
    stated(f"training, {name}: greatest difference of a resumed run", resumed, bound)


# torch warns of what is not done: nothing writes into the output of a network.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_sharded_on_one_rank(device: str, stated: Stated, tmp_path: Path) -> None:
    """FSDP2, stopped once, against a plain run."""
    whole = train_digits(tmp_path / "whole", device, 8, OFTEN)
    sharded = (OFTEN, "trainer=fsdp")
    train_digits(tmp_path / "fsdp", device, 4, *sharded)
    losses = train_digits(tmp_path / "fsdp", device, 8, *sharded)
    folders = list((tmp_path / "fsdp" / "checkpoints").glob("step-*.ckpt"))
    assert folders and all(folder.is_dir() for folder in folders), "it was not sharded"
    apart = max(abs(a / b - 1) for a, b in zip(losses, whole, strict=True))
    stated("FSDP2 on one rank: greatest relative difference of 8 losses", apart, 1e-4)
    exported = [load_file(tmp_path / run / "model.safetensors") for run in ("fsdp", "whole")]
    stated("FSDP2 on one rank: greatest difference of a weight", furthest(*exported), 5e-3)
