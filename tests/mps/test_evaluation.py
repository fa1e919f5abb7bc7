"""Evaluating where the network's device holds no float64: sums and statistics stay on the CPU."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sag_dit.cli import attention, evaluate, sample
from sag_dit.cli.app import launch
from sag_dit.evaluation.classifier import bundled_classifier
from sag_dit.evaluation.dino import DINOv2
from sag_dit.evaluation.features import FeatureExtractor
from sag_dit.evaluation.reference import load_reference
from sag_dit.evaluation.suite import METRICS, Suite
from tests.evaluation.making import Tiny, pixels
from tests.evaluation.test_dino import SMALL

EXTRACTORS = {
    "tiny": Tiny,
    "digits": lambda: bundled_classifier("digits"),
    "dinov2": lambda: DINOv2(SMALL, pretrained=False),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_reference_and_metrics(mps: torch.device, name: str) -> None:
    torch.manual_seed(0)
    made = EXTRACTORS[name]()
    count = 4 if name == "dinov2" else 60
    real, drawn = pixels(count, 0), pixels(count, 1)

    def measured(device: torch.device | str) -> dict[str, float]:
        extractor: FeatureExtractor = copy.deepcopy(made).to(device)
        reference = load_reference((real, torch.zeros(count).long()), extractor, cache=None)
        assert reference.features is not None and reference.features.device.type == "cpu"
        every = tuple(key for key, kind in METRICS.items() if kind.features != "images")
        names = every if name == "tiny" else ("fid", "precision", "recall")
        suite = Suite(extractor, reference, names, split_size=30).to(device)
        for part in torch.arange(count).split(20):
            suite.update(drawn[part].to(device), part.to(device))
        return dict(suite.compute())

    expected = measured("cpu")
    assert measured(mps) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def results(out: str) -> list[dict[str, float]]:
    told: Any = json.loads(Path(out, "results.json").read_text())
    return [row["metrics"] for row in told["results"]]


def run(module: ModuleType, *arguments: str) -> None:
    name = module.__name__.rpartition(".")[2]
    launch(name, getattr(module, f"run_{name}"), list(arguments))


def test_evaluate(mps: torch.device) -> None:
    """All rows of the bundled digits with all of their metrics, and their spread."""
    given = ("ckpt=digits", "compare=digits", "num_images=40", "steps=2", "batch_size=20")
    for device in ("cpu", "mps"):
        where = (f"out={device}", f"finished=finished-{device}", f"trainer.accelerator={device}")
        run(evaluate, *given, *where)
    expected, found = results("cpu"), results("mps")
    assert len(expected) == len(found) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-2)


def test_sample(mps: torch.device) -> None:
    """Images with gallery, maps and an npz; a pixel may be rounded to its neighbour."""
    given = ("ckpt=digits", "num_images=2", "steps=3", "batch_size=2", "gallery.num=1")
    more = ("maps=true", "npz=true", "sag_scale=1", "guidance.sag.quantile=0.5", "cfg_scale=1.5")
    for device in ("cpu", "mps"):
        run(sample, *given, *more, f"out={device}", f"trainer.accelerator={device}")
        assert Path(device, "index.html").is_file() and list(Path(device).glob("attention/*"))
    for name in ("000000.png", "000001.png"):
        found, expected = (
            np.asarray(Image.open(f"{d}/images/{name}"), int) for d in ("mps", "cpu")
        )
        assert np.abs(found - expected).max() <= 1


def test_attention(mps: torch.device) -> None:
    for device in ("cpu", "mps"):
        run(attention, "ckpt=digits", "steps=2", f"device={device}", f"out={device}")
    files = sorted(path.name for path in Path("cpu").iterdir())
    assert files == sorted(path.name for path in Path("mps").iterdir()) and files
