"""``experiment=finetune`` on a UNet of ADM's layout, and sampling from it with guidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sag_dit.checkpoints import load
from sag_dit.models.unet.adapter import TABLE, Sizes, Variant
from tests.checkpoints.openai import state_of

Command = Callable[..., Any]


def published(path: Path, classes: int) -> Path:
    """A small file as openai wrote them, of 16 x 16 pixels, and beside it what it does not tell."""
    random = torch.Generator().manual_seed(0)
    sizes = Sizes(3, 32, 1, (1, 2), (1,), True, False, classes, True)
    shapes = state_of(Variant("", sizes, 16, {}))
    state = {
        name: torch.randn(each.shape, generator=random) * each[0].numel() ** -0.5
        if each.ndim > 1
        else torch.ones(each.shape) * name.endswith("weight")
        for name, each in shapes.items()
    }
    torch.save(state, path)
    beside = {
        "model": {"input_size": 16, "num_head_channels": 32},
        "process": {"schedule": "linear", "num_timesteps": 1000},
    }
    path.with_suffix(".json").write_text(json.dumps(beside))
    return path


@pytest.mark.parametrize("classes", [0, 3], ids=["without classes", "with classes"])
def test_it_is_tuned_stopped_and_drawn_from(
    in_process: Command, tmp_path: Path, classes: int
) -> None:
    base = published(tmp_path / "adm.pt", classes)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    arguments = (
        "experiment=finetune",
        f"ckpt={base}",
        f"data.root={tmp_path / 'photos'}",
        "data.batch_size=2",
        "data.workers=0",
        "every_n_steps.checkpoint=1",
        "preview.steps=1",
        "trainer.accelerator=cpu",
    )
    whole = in_process("train", *arguments, "max_steps=3", "out=whole")
    assert whole.code == 0, whole.err
    assert "fine-tuning adm" in whole.out and "2 new (cat, dog)" in whole.out
    assert in_process("train", *arguments, "max_steps=2", "out=stopped").code == 0
    on = in_process("train", *arguments, "max_steps=3", "out=stopped")
    assert on.code == 0 and "going on from step 2 of 3" in on.out
    tuned = load_file("whole/model.safetensors")
    torch.testing.assert_close(load_file("stopped/model.safetensors"), tuned, rtol=0, atol=0)
    loaded = load(base).denoiser.network.state_dict()
    same = {n for n in loaded if loaded[n].shape == tuned[n].shape}
    assert loaded.keys() - same == ({TABLE} if classes else set())
    assert any(not torch.equal(tuned[name], loaded[name]) for name in same)

    # What had classes has no null row, and what had none has learned with one.
    guidance = ["sag_scale=0.5", *(["cfg_scale=1.5"] if not classes else [])]
    drawn = in_process(
        "sample", "ckpt=whole", "classes=[dog]", "steps=2", "num_images=1", *guidance
    )
    assert drawn.code == 0, drawn.err
    assert len(list((drawn.folder() / "images").glob("*.png"))) == 1
    if classes:
        refused = in_process(
            "sample", "ckpt=whole", "classes=[dog]", "steps=2", "num_images=1", "cfg_scale=1.5"
        )
        assert refused.code == 1 and "label dropout" in refused.err
