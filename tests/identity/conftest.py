"""The configuration of a training run."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sag_dit.cli.composing import config_folder


@pytest.fixture(scope="module")
def config() -> DictConfig:
    """``python train.py experiment=digits``; copy before changing it."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", ["experiment=digits"])
