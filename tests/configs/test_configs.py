"""Every YAML in configs/ composes, and what it describes can be built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from sag_dit.checkpoints import build
from sag_dit.cli.app import config_folder
from sag_dit.guidance import Term
from sag_dit.sampler import Sampler

FOLDER = config_folder()
COMMANDS = ("sample", "train")
ALL = sorted(file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*.yaml"))


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (FOLDER / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def composing() -> Iterator[None]:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        yield


def targets(node: object) -> Iterator[Mapping[str, Any]]:
    """All descriptions of an object within a configuration."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize("file", ALL)
def test_what_is_named_exists_and_takes_these_arguments(file: str) -> None:
    nodes = list(targets(OmegaConf.to_container(OmegaConf.load(FOLDER / file))))
    for node in nodes:
        arguments = [name for name in node if name not in ("_target_", "_partial_", "defaults")]
        taken = inspect.signature(get_object(node["_target_"])).parameters
        assert set(arguments) <= set(taken)
    group = file.split("/")[0]
    if group in ("sampler", "trainer", "data", "objective"):
        assert len(nodes) == 1


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_commands_compose_and_hydra_makes_no_folder_of_its_own(name: str) -> None:
    config = compose(name, return_hydra_config=True)
    assert config.hydra.run.dir == "."
    assert config.hydra.output_subdir is None
    assert config.hydra.job_logging == {
        "version": 1,
        "root": None,
        "disable_existing_loggers": False,
    }


def test_defaults_of_sample() -> None:
    config = compose("sample")
    assert (config.ckpt, config.sag_scale, config.cfg_scale) == ("digits", 1.0, 1.0)
    assert config.out is None  # so that the folder is named by what determines pixels


@pytest.mark.parametrize("name", choices("sampler"))
def test_samplers(name: str) -> None:
    sampler = instantiate(compose("sample", [f"sampler={name}"]).sampler)
    assert isinstance(sampler, Sampler)


def test_one_file_is_one_sampler() -> None:
    loaded = {
        name: OmegaConf.load(FOLDER / "sampler" / f"{name}.yaml") for name in choices("sampler")
    }
    samplers = {name: instantiate(config) for name, config in loaded.items()}
    assert len({repr(sampler) for sampler in samplers.values()}) == len(samplers)


@pytest.mark.parametrize("name", choices("guidance"))
def test_guidance(name: str) -> None:
    scales = ["sag_scale=0.25", "cfg_scale=3", "blur_scale=0.125"]
    config = compose("sample", [f"guidance={name}", *scales])
    terms = {
        key: instantiate(node, _convert_="all") for key, node in config.guidance.items() if node
    }
    assert all(isinstance(term, Term) for term in terms.values())
    # The aliases arrive, in each preset.
    assert (terms["sag"].scale, terms["cfg"].scale, terms["blur"].scale) == (0.25, 3, 0.125)
    off = compose("sample", [f"guidance={name}", "sag_scale=0", "cfg_scale=1", "blur_scale=0"])
    assert all(instantiate(node).off for node in off.guidance.values())


def check_trainer(config: DictConfig, tmp_path: Path) -> None:
    trainer = instantiate(
        config.trainer, logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path)
    )
    assert isinstance(trainer, Trainer)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", choices("trainer"))
def test_trainers(command: str, name: str, tmp_path: Path) -> None:
    check_trainer(compose(command, [f"trainer={name}"]), tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", choices("logger"))
def test_loggers(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = compose(command, [f"logger={name}", f"out={tmp_path}"])
    logger = instantiate(config.logger) if config.logger else None
    if name == "none":
        assert logger is None
    else:
        assert isinstance(logger, Logger)
        assert logger.save_dir is None or Path(logger.save_dir) == tmp_path


@pytest.mark.parametrize("name", choices("experiment"))
def test_experiments(name: str, tmp_path: Path) -> None:
    config = compose("train", [f"experiment={name}", f"out={tmp_path}"])
    assert not OmegaConf.missing_keys(config)
    assert config.name and config.max_steps > 0
    data = instantiate(config.data)
    assert isinstance(data, LightningDataModule)
    description = {
        key: OmegaConf.to_container(config[key], resolve=True) for key in ("model", "process")
    }
    denoiser = build(
        {
            **description,
            "kind": config.kind,
            "x_0_range": config.x_0_range,
            "class_names": data.class_names,
        }
    )
    optimizer = instantiate(config.optimizer)(denoiser.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    assert isinstance(instantiate(config.ema), EMAWeightAveraging)
    check_trainer(config, tmp_path)
