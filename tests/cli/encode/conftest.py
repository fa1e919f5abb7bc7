"""A small autoencoder, ten photos, and ``encode.py`` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sag_dit.cli import encode
from sag_dit.cli.app import launch
from sag_dit.data import encoding
from tests.data.making import image_folder, save_vae

SETTINGS = ("data.size=16", "slice_size=2", "workers=0", "trainer.accelerator=cpu")

Encode = Callable[..., SimpleNamespace]
Contents = Callable[[Path], dict[str, str]]
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of two classes."""
    return image_folder(tmp_path_factory.mktemp("photos"), each=5)


@pytest.fixture
def command(
    vae: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Encode:
    """Run ``encode.py`` in this process; count the images that pass through the autoencoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["encode.py"])
    encoded = 0
    encode_crops = encoding.encode_crops

    def counting(plan: Any, crops: torch.Tensor, device: torch.device) -> torch.Tensor:
        nonlocal encoded
        encoded += len(crops)
        return encode_crops(plan, crops, device)

    monkeypatch.setattr(encoding, "encode_crops", counting)

    def run(*arguments: str, out: str = "out", root: Path = photos) -> SimpleNamespace:
        nonlocal encoded
        encoded, code = 0, 0
        capsys.readouterr()
        given = (f"data.root={root}", f"vae={vae}", f"out={out}", "rows=4", *SETTINGS, *arguments)
        try:
            launch("encode", encode.run_encode, given)
        except SystemExit as stop:
            code = int(str(stop.code))
        printed = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=printed.out, err=printed.err, encoded=encoded, folder=tmp_path / out
        )

    return run
