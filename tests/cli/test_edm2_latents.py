"""Runs on latents that EDM2's dataset_tool.py has written, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sag_dit.checkpoints import EDM2Autoencoder, load
from tests.data.making import save_vae
from tests.data.test_npy_latents import edm2_zip

Command = Callable[..., Any]


def test_runs_on_it_go_on_and_are_drawn_without_more_words(
    in_process: Command, tmp_path: Path
) -> None:
    file, vae = edm2_zip(tmp_path / "sd.zip"), save_vae(tmp_path / "vae")
    own = (
        *("experiment=digits", "model.hidden_size=48", "model.depth=1", "model.num_heads=3"),
        *("data=latents", f"data.root={file}", "data.batch_size=4", "data.workers=0"),
        *("resolution=[8,12]", "patch_size=2", "every_n_steps.checkpoint=2", "name=edm2"),
        "preview.guidance.sag=null",  # whose kernel is larger than these latents
        *("vae._target_=sag_dit.checkpoints.EDM2Autoencoder", f"vae.vae={vae}"),
    )

    def train(*more: str) -> dict[str, torch.Tensor]:
        done = in_process("train", *own, *more)
        assert done.code == 0, done.err
        assert "data: 5 images in 3 classes" in done.out
        return load_file(
            Path(done.out.splitlines()[-1].removeprefix("run: ")) / "model.safetensors"
        )

    whole = train("out=whole", "max_steps=4")
    train("out=parts", "max_steps=2")
    parts = train("out=parts", "max_steps=4")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    drawn = in_process("sample", "ckpt=whole", "num_images=1", "steps=2", "sag_scale=0")
    assert drawn.code == 0, drawn.err
    assert isinstance(load("whole").codec.vae, EDM2Autoencoder)  # type: ignore[attr-defined]
