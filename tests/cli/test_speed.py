"""``speed`` and its keys at the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sag_dit.cli.composing import compose
from sag_dit.models import DiT
from tests import stand_ins

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def products_as_they_were() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def latent(in_process: Command, save_official: Command, tmp_path: Path) -> Command:
    """``sample.py`` with a small model of latents and its autoencoder."""
    weights = save_official(tmp_path / "latent.pt", in_channels=4)
    vae = tmp_path / "vae"
    stand_ins.save_vae(vae)
    options = (f"vae={vae}", "steps=2", "batch_size=2", "num_images=3", "sag_scale=0")

    def run(*arguments: str) -> Any:
        return in_process("sample", f"ckpt={weights}", *options, *arguments)

    return run


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())["settings"]
    return found


def test_exact_is_the_default_and_changes_nothing(latent: Command) -> None:
    plain, exact = latent(), latent("speed=exact")
    assert plain.code == exact.code == 0, plain.err + exact.err
    assert exact.folder() == plain.folder() and exact.evaluations == 0
    assert "speed:" not in plain.out + exact.out
    told = settings(plain.folder())
    assert {"matmul", "compile", "islands"}.isdisjoint(told)
    assert told["precision"] == "32-true" and told["codec"]["slice_size"] == 1
    assert {"dtype", "channels_last"}.isdisjoint(told["codec"])


def test_fast_is_told_and_is_another_folder(latent: Command) -> None:
    exact, fast = latent(), latent("speed=fast")
    assert fast.code == 0, fast.err
    assert "speed: network bf16, TF32, decoding bf16, 4 latents decoded at once" in fast.out
    assert fast.folder() != exact.folder()
    told = settings(fast.folder())
    assert (told["precision"], told["matmul"], told["islands"]) == ("bf16-true", "high", True)
    assert "compile" not in told
    codec = told["codec"]
    assert (codec["slice_size"], codec["dtype"], codec["channels_last"]) == (4, "bfloat16", True)
    # The page's command draws the same images again.
    again = latent("speed=fast", "gallery.num=2")
    assert again.code == 0 and again.folder() == fast.folder() and again.evaluations == 0
    assert "trainer.precision=bf16-true matmul=high" in (again.folder() / "index.html").read_text()


def test_each_line_of_a_speed_may_be_overridden(latent: Command) -> None:
    mixed = latent("speed=fast", "trainer.precision=32-true", "decoding.batch_size=2")
    assert mixed.code == 0, mixed.err
    assert "speed: TF32, decoding bf16, 2 latents decoded at once" in mixed.out
    back = latent(
        "speed=fast",
        "trainer.precision=32-true",
        "matmul=highest",
        "decoding={batch_size:1,precision:32-true,channels_last:false}",
    )
    assert back.code == 0, back.err
    assert "speed:" not in back.out and back.folder() == latent().folder()


def test_fastest_compiles_the_blocks_once(latent: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[DiT] = []
    monkeypatch.setattr(DiT, "compile_blocks", lambda network: compiled.append(network))
    outcome = latent("speed=fastest")
    assert outcome.code == 0, outcome.err
    assert len(compiled) == 1 and settings(outcome.folder())["compile"] is True
    assert "speed: network bf16, TF32, compiled, decoding bf16" in outcome.out


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize("speed", ["exact", "fast", "fastest"])
def test_speeds_set_the_same_keys_in_every_command(command: str, speed: str) -> None:
    config = compose(command, [f"speed={speed}", *(["ckpt=digits"] * (command == "evaluate"))])
    exact = speed == "exact"
    assert config.compile is (speed == "fastest")
    assert config.matmul == ("highest" if exact else "high")
    assert config.trainer["precision"] == ("32-true" if exact else "bf16-true")
    assert config.decoding.channels_last is not exact


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("speed=quick", "expected one of exact, fast, fastest"),
        ("matmul=tf32", "expected one of highest, high, medium"),
        ("decoding.precision=bf16", "expected one of 32-true, bf16-true"),
        ("decoding.batch_size=0", "expected a whole number, 1 to 65,536"),
        ("decoding=null", "decoding"),
        ("compile=abc", "expected true or false"),
    ],
)
def test_a_wrong_value_is_named(latent: Command, argument: str, told: str) -> None:
    outcome = latent(argument)
    assert outcome.code == 1
    assert argument.partition("=")[0] in outcome.err and told in outcome.err
    assert "Traceback" not in outcome.err
