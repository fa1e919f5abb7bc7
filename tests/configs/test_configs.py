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
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sag_dit.cli.composing import checked_config, config_folder
from sag_dit.cli.keys import Train
from sag_dit.cli.train_model import make_model
from sag_dit.guidance import Term
from sag_dit.methods import methods
from sag_dit.sampler import Sampler
from sag_dit.training.optimizers import PACKAGES

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
    loaded = OmegaConf.to_container(OmegaConf.load(FOLDER / file))
    nodes = list(targets(loaded))
    for node in nodes:
        if node["_target_"].partition(".")[0] in PACKAGES:
            pytest.importorskip(node["_target_"].partition(".")[0])
        arguments = [name for name in node if name not in ("_target_", "_partial_", "defaults")]
        taken = inspect.signature(get_object(node["_target_"])).parameters
        assert set(arguments) <= set(taken)
    group = file.split("/")[0]
    if group in ("sampler", "data", "objective"):
        assert len(nodes) == 1 or "defaults" in loaded
    if group == "trainer":
        assert nodes[0]["_target_"] == "lightning.pytorch.Trainer"


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
    assert (config.ckpt, config.sag_scale, config.cfg_scale) == ("emoji", 1.0, 1.0)
    assert config.out is None  # so that the folder is named by what determines pixels


@pytest.mark.parametrize("name", sorted({*choices("sampler")} - {"auto"}))
def test_samplers(name: str) -> None:
    sampler = instantiate(compose("sample", [f"sampler={name}"]).sampler)
    assert isinstance(sampler, Sampler)


def test_one_file_is_one_sampler() -> None:
    loaded = {
        name: OmegaConf.load(FOLDER / "sampler" / f"{name}.yaml")
        for name in choices("sampler")
        if name != "auto"  # one of the others
    }
    samplers = {name: instantiate(config) for name, config in loaded.items()}
    assert len({repr(sampler) for sampler in samplers.values()}) == len(samplers)


@pytest.mark.parametrize("name", choices("guidance"))
def test_guidance(name: str) -> None:
    # What makes a second model is no setting of a preset.
    second = {"auto": "ckpt", "classifier": "classifier"}
    given = [f"guidance.{key}.{setting}=some.pt" for key, setting in second.items()]
    scales = {f"{method.key}_scale": method.neutral + 0.25 for method in methods()}
    on = [f"{key}={scale}" for key, scale in scales.items()]
    config = compose("sample", [f"guidance={name}", *on, *given])
    terms = {key: instantiate(node, _convert_="all") for key, node in config.guidance.items()}
    assert all(isinstance(term, Term) and not term.off for term in terms.values())
    # The scales' own keys arrive, in each preset.
    assert {f"{key}_scale": term.scale for key, term in terms.items()} == scales
    off = compose("sample", [f"guidance={name}", "sag_scale=0"])
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


# finetune needs a checkpoint, emoji its latents: tests/cli has a test of each.
@pytest.mark.parametrize("name", sorted({*choices("experiment")} - {"finetune", "emoji"}))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experiments(name: str, tmp_path: Path) -> None:
    """With eight small photos where a recipe wants images, and in pixels."""
    overrides = []
    if name not in ("digits", "digits_unet", "patches"):
        for index in range(8):
            photo = tmp_path / "photos" / str(index % 2) / f"{index}.png"
            photo.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (70, 64), (index * 20, 0, 0)).save(photo)
        photos = f"data.root={tmp_path / 'photos'}"
        overrides = [photos, "vae=null", "num_classes=null", "data.batch_size=4"]
    config = compose("train", [f"experiment={name}", f"out={tmp_path}", *overrides])
    told: Train = checked_config("train", config)
    assert told.name and told.max_steps > 0
    data = instantiate(config.data)
    assert isinstance(data, LightningDataModule)
    with torch.device("meta"):
        model = make_model(told, data)
    data.check(model)
    instantiate(config.objective).check(model.denoiser)
    optimizer = instantiate(config.optimizer)(model.denoiser.parameters())
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr
    check_trainer(config, tmp_path)


def test_the_imagenet_recipe_is_the_published_one() -> None:
    config = compose("train", ["experiment=imagenet256", "data.root=imagenet"])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 0)
    assert list(config.optimizer.betas) == [0.9, 0.999]
    assert (config.data.batch_size, config.ema.decay, config.max_steps) == (256, 0.9999, 7_000_000)
    assert not config.ema.warmup
    assert (config.model.depth, config.model.hidden_size, config.patch_size) == (28, 1152, 2)
    assert (config.model.class_dropout_prob, config.model.learn_sigma) == (0.1, True)
    assert config.objective["_target_"].endswith("Hybrid")
    assert (config.matmul, config.data.flip, config.data.upright) == ("high", True, False)
