"""Files and folders of other trainers are read, or named with the command that converts them."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sag_dit.checkpoints import from_denoiser, load
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from tests.checkpoints.conftest import Same

DEEPSPEED = {"ds_version": "0.14.4", "ds_config": {"zero_optimization": {"stage": 2}}}


def pieces(state: dict[str, Any], folder: Path, stem: str, suffix: str) -> None:
    """Write weights as two files and their index, as accelerate and transformers do."""
    names = list(state)
    halves = {
        f"{stem}-0000{i + 1}-of-00002.{suffix}": {name: state[name] for name in names[i::2]}
        for i in range(2)
    }
    for file, part in halves.items():
        save = save_file if suffix == "safetensors" else torch.save
        save(part, folder / file)
    where = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "DiT-B-2.pt", "step_100.pth", "last.ckpt"]
)
def test_the_one_file_of_a_folder_is_read(
    pixel_dit: DiT, tmp_path: Path, same: Same, name: str
) -> None:
    state, folder = pixel_dit.state_dict(), tmp_path / "folder"
    folder.mkdir()
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, folder / name)
    (folder / "README.md").write_text("A model.")
    model = load(folder)
    assert same(model.denoiser.network, pixel_dit)
    assert model.name == "folder" and model.sha256 == load(folder / name).sha256


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pieces_with_an_index_are_joined(
    pixel_dit: DiT, tmp_path: Path, same: Same, suffix: str
) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    pieces(pixel_dit.state_dict(), tmp_path, stem, suffix)
    assert same(load(tmp_path).denoiser.network, pixel_dit)
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"not all files that {stem}.{suffix}.index.json names"):
        load(tmp_path)


def test_what_accelerate_keeps_beside_is_no_weights(
    pixel_dit: DiT, tmp_path: Path, same: Same, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(pixel_dit.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl"):
        torch.save({"state": {}}, tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert same(load(tmp_path).denoiser.network, pixel_dit)
    assert "keeps no averaged weights; the raw ones are taken" in caplog.text
    assert load(tmp_path, ema=False).config["weights"] == "raw"


def test_of_several_files_one_is_asked_for(pixel_dit: DiT, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(pixel_dit.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"2 weight files \(a\.pt, b\.pt\); pass the path of one"):
        load(tmp_path)


@pytest.mark.parametrize("beside", ["model_1.safetensors", "model_ema.safetensors", "ema.pt"])
def test_raw_weights_are_not_taken_where_an_average_lies_beside_them(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, beside: str
) -> None:
    # accelerate numbers the networks that it was given, of which the second is the average.
    save_file(pixel_dit.state_dict(), tmp_path / "model.safetensors")
    save = save_file if beside.endswith("safetensors") else torch.save
    save(ema_dit.state_dict(), tmp_path / beside)
    with pytest.raises(
        ValueError, match=rf"\(model\.safetensors, {beside}\); pass the path of one"
    ):
        load(tmp_path)


@pytest.mark.parametrize("latest", [True, False])
def test_deepspeeds_whole_module_is_read(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, same: Same, latest: bool
) -> None:
    for step, network in ((5, ema_dit), (10, pixel_dit)):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        module = {f"module.{name}": value for name, value in network.state_dict().items()}
        value = {"module": module, "param_shapes": None, "global_steps": step, **DEEPSPEED}
        torch.save(value, folder / "mp_rank_00_model_states.pt")
        torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    if latest:
        (tmp_path / "latest").write_text("global_step5")
    assert same(load(tmp_path).denoiser.network, ema_dit if latest else pixel_dit)
    assert same(load(tmp_path / "global_step10").denoiser.network, pixel_dit)
    file = tmp_path / "global_step10" / "mp_rank_00_model_states.pt"
    assert load(file, ema=False).config["weights"] == "raw"


def test_latest_names_nothing_outside(pixel_dit: DiT, tmp_path: Path) -> None:
    torch.save(pixel_dit.state_dict(), tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("../")
    with pytest.raises(ValueError, match="a folder without checkpoint"):
        load(tmp_path / "run")


@pytest.mark.parametrize("ranks", [("zero_pp_rank_0_mp_rank_00",), ("mp_rank_00", "mp_rank_01")])
def test_deepspeeds_pieces_are_named_with_the_command(
    pixel_dit: DiT, tmp_path: Path, ranks: tuple[str, ...]
) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    empty = {name: torch.zeros(0) for name in pixel_dit.state_dict()}
    for rank in ranks:
        torch.save({"module": empty, **DEEPSPEED}, folder / f"{rank}_model_states.pt")
    command = re.escape(f"python {tmp_path}/zero_to_fp32.py {tmp_path} {tmp_path}/whole")
    for path in (tmp_path, folder, folder / f"{ranks[0]}_model_states.pt"):
        with pytest.raises(ValueError, match=rf"in pieces \(ZeRO 3.*{command}"):
            load(path)


def command_in(message: str) -> list[str]:
    """The command that a message names, for this interpreter."""
    (command,) = re.findall(r"`python (.*)`", message)
    return [sys.executable, *shlex.split(command)]


def distributed(value: dict[str, Any], folder: Path) -> None:
    """Write a torch.distributed checkpoint by one process."""
    import torch.distributed.checkpoint as dcp

    dcp.save(value, checkpoint_id=folder, no_dist=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_are_named_with_a_command_that_works(
    pixel_dit: DiT, ema_dit: DiT, tmp_path: Path, same: Same
) -> None:
    folder = tmp_path / "step"
    distributed({"model": pixel_dit.state_dict(), "ema": ema_dit.state_dict()}, folder)
    with pytest.raises(ValueError, match=r"torch\.distributed checkpoint, in pieces") as told:
        load(folder)
    subprocess.run(command_in(str(told.value)), check=True, capture_output=True)
    assert same(load(f"{folder}.pt").denoiser.network, ema_dit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sharded_runs_are_named_with_a_command_that_works(
    pixel_dit: DiT, tmp_path: Path, same: Same
) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000005.ckpt"
    state = {f"denoiser.network.{n}": value for n, value in pixel_dit.state_dict().items()}
    distributed({"state_dict": state}, folder)
    denoiser = ClassConditional(pixel_dit, DDPM(), x_0_range=(-1, 1))
    description = from_denoiser(denoiser, "x").description
    torch.save({"hyper_parameters": description, "global_step": 5}, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"torch\.distributed checkpoint, in pieces") as told:
        load(tmp_path / "run", ema=False)
    subprocess.run(command_in(str(told.value)), check=True, capture_output=True)
    loaded = load(f"{folder}.consolidated", ema=False)
    assert same(loaded.denoiser.network, pixel_dit) and loaded.config["model"]["num_heads"] == 2


def test_accelerates_sharded_folder_is_named(pixel_dit: DiT, tmp_path: Path) -> None:
    inner = tmp_path / "pytorch_model_fsdp_0"
    inner.mkdir()
    (inner / ".metadata").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(ValueError, match=rf"dcp_to_torch {inner} {inner}\.pt`"):
        load(tmp_path)


def test_a_config_in_the_folder_or_beside_the_file_is_read(
    pixel_dit: DiT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(pixel_dit.state_dict(), tmp_path / "weights.pt")
    load(tmp_path)
    named = {file for file in re.findall(r"in (\S+\.json) beside it", caplog.text)}
    assert named == {"weights.json"}
    (tmp_path / "weights.json").write_text('{"model": {"num_heads": 4}}')
    (tmp_path / "config.json").write_text('{"model": {"num_heads": 1}, "kind": "v"}')
    denoiser: Any = load(tmp_path).denoiser
    assert denoiser.network.arguments["num_heads"] == 4 and denoiser.kind == "v"
