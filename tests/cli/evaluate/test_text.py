"""``evaluate.py`` of a text model: its prompts drawn on the fly and measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import tiny

Evaluate = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion as diffusers saves it."""
    folder = tmp_path_factory.mktemp("text") / "sd"
    tiny.sd().save_pretrained(folder)
    return folder


def test_prompts_of_a_file_are_measured(evaluate: Evaluate, folder: Path, tmp_path: Path) -> None:
    prompts = ["a corgi", "a castle, at dawn"]
    lines = [f'{seed},"{prompts[seed % 2]}"' for seed in range(8)]
    (tmp_path / "prompts.csv").write_text("seed,label\n" + "\n".join(lines) + "\n")
    outcome = evaluate(
        f"ckpt={folder}",
        "requests=prompts.csv",
        "text.size=[32,32]",
        "features=patches",
        "reference=patches:report",
        "compare.cfg_sag.cfg_scale=3",
        "steps=2",
        "batch_size=4",
        "gallery.num=2",
        "trainer.accelerator=cpu",
    )
    results = outcome.results
    assert [result["name"] for result in results][:1] == ["unguided"]
    assert "CFG 3 + SAG 1" in [result["name"] for result in results]
    for result in results:
        assert result["facts"]["count"] == 8
        assert result["facts"]["sample_labels"]["classes"] == 2
    values = {result["metrics"]["fid"] for result in results}
    assert len(values) == len(results)


def test_one_prompt_for_all_images(evaluate: Evaluate, folder: Path) -> None:
    outcome = evaluate(
        f"ckpt={folder}",
        "prompt=a corgi",
        "text.size=[32,32]",
        "features=patches",
        "sag_scale=0.75",
        "num_images=6",
        "steps=2",
        "trainer.accelerator=cpu",
    )
    (result,) = outcome.results
    assert result["name"] == "SAG 0.75"
    assert result["facts"]["sample_labels"]["classes"] == 1
