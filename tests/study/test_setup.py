"""Bundled models are measured with their own features against their own held-out half."""

from __future__ import annotations

import pytest
import torch

from sag_dit.checkpoints import load
from sag_dit.evaluation.classifier import KINDS
from sag_dit.study.setup import Setups, example_of


@pytest.mark.parametrize("name", KINDS)
def test_a_bundled_model_brings_its_features_and_its_reference(name: str) -> None:
    model = load(name)
    setup = Setups("cpu").setup(example_of(model), model.class_names)
    assert (setup.extractor.name, setup.reference.name) == (name, f"{name}:report")
    assert setup.metrics == ("fid", "sfid", "is", "precision", "recall")


def test_images_of_other_classes_get_no_bundled_features() -> None:
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Inception"):
        Setups("cpu").setup(black, ("cat", "dog"))
