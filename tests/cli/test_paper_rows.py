"""Every experiment of configs/experiment/paper is drawn and measured, in two steps of stand-ins.

The stand-ins have the published files' names and layout and lie in the folder that SAG_DIT_WEIGHTS
names; so nothing but what makes a run short is added to an experiment. A few rows are run every
day, all of them by CI.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sag_dit.cli import evaluate as evaluate_command
from sag_dit.cli.composing import config_folder
from tests import stand_ins

Command = Callable[..., Any]

ROWS = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
    for file in sorted((config_folder() / "experiment" / "paper").glob("*.yaml"))
}
DRAWN = [name for name, row in ROWS.items() if row.get("ckpt")]
MEASURED = [name for name, row in ROWS.items() if "expected" in row]
EVERY_DAY = {
    "adm128_cg_sag0.1",  # both guidances
    "adm128_ddim25_cg_sag0.1",  # the row without numbers
    "adm256_uncond_sag0.8",  # four heads
    "adm256_upsampled",  # images on disk
    "dit256_cfg1.5",  # latents
}
SHORT = ("steps=2", "batch_size=2", "gallery.num=0", "trainer.accelerator=cpu")
IMAGES = 4
"""Precision and recall look at three neighbours of an image."""
METRICS = {"fid", "sfid", "is", "precision", "recall"}


def each(names: list[str]) -> list[Any]:
    """The names as parameters, those that only CI runs being slow."""
    return [
        name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.fixture(scope="session")
def paper_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in of every file that the experiments name."""
    folder = tmp_path_factory.mktemp("weights")
    for file in (
        "128x128_diffusion.pt",
        "128x128_classifier.pt",
        "256x256_diffusion.pt",
        "256x256_diffusion_uncond.pt",
        "lsun_cat.pt",
        "lsun_horse.pt",
    ):
        stand_ins.save_openai(folder, file)
    for file in ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"):
        stand_ins.save_dit(folder / file, in_channels=4, input_size=stand_ins.SIDE // 2)
    stand_ins.save_vae(folder / "sd-vae-ft-ema")
    for file in {ROWS[name]["expected"]["protocol"]["reference"] for name in MEASURED}:
        write_images(folder / file, 8)
    return folder


@pytest.fixture(autouse=True)
def published_weights(paper_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up among the stand-ins."""
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(paper_weights))


def write_images(path: Path, count: int) -> None:
    """Write random images as ADM's files have them."""
    shape = (count, stand_ins.SIDE, stand_ins.SIDE, 3)
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def test_the_days_rows_exist() -> None:
    assert ROWS.keys() >= EVERY_DAY
    assert set(ROWS) == {*DRAWN, *MEASURED}


@pytest.mark.parametrize("name", each(DRAWN))
def test_a_row_is_drawn(name: str, in_process: Command) -> None:
    outcome = in_process("sample", f"experiment=paper/{name}", "num_images=2", *SHORT)
    assert outcome.code == 0, outcome.err
    files = sorted((outcome.folder() / "images").glob("*.png"))
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert [image.shape for image in pixels] == [(stand_ins.SIDE, stand_ins.SIDE, 3)] * 2
    assert all(image.std() > 1 for image in pixels) and (pixels[0] != pixels[1]).any()
    record = yaml.safe_load((outcome.folder() / "config.yaml").read_text(encoding="utf-8"))
    settings = record["settings"]
    assert settings["model"] == ROWS[name]["ckpt"]
    scales = {term: settings["guidance"][term]["scale"] for term in settings["guidance"]}
    stated = {
        key.removesuffix("_scale"): value
        for key, value in ROWS[name].items()
        if key.endswith("_scale") and value != (1.0 if key == "cfg_scale" else 0.0)
    }
    assert scales == stated
    if "sag" in scales:
        sag = settings["guidance"]["sag"]
        at_128 = name.startswith("adm128")
        layer = f"up_blocks.{2 if at_128 else 0}.attentions.2"
        assert (sag["layer"], sag.get("heads")) == (layer, None if at_128 else 4)


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``evaluate.py`` in an empty working directory, its references kept there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "references"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    return lambda *arguments: evaluate_command.start(arguments)


@pytest.mark.parametrize("name", each(MEASURED))
@pytest.mark.filterwarnings("ignore:kernel_size")
def test_a_row_is_measured_beside_the_papers_numbers(
    name: str,
    tmp_path: Path,
    evaluate: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = ROWS[name]["expected"]
    protocol = expected["protocol"]
    if name in DRAWN:
        images = [f"num_images={IMAGES}", *SHORT]
    else:
        write_images(tmp_path / protocol["samples"], IMAGES)
        images = [f"samples={protocol['samples']}"]
    evaluate(f"experiment=paper/{name}", "features=patches", *images)
    out = capsys.readouterr().out

    (file,) = [line for line in out.splitlines() if line.startswith("results: ")]
    (result,) = json.loads(Path(file.removeprefix("results: ")).read_text())["results"]
    assert result["metrics"].keys() == METRICS
    beside, _, rest = out[out.index(f"beside {expected['source']}") :].partition("differ, in")
    labels = {"fid": "FD", "sfid": "sFD", "is": "IS", "precision": "precision", "recall": "recall"}
    table = {line.split()[0]: line.split()[1:] for line in beside.splitlines() if len(line) > 9}
    for metric, published in expected["metrics"].items():
        shown, here, difference = map(float, table[labels[metric]])
        assert shown == pytest.approx(published, rel=1e-5)
        assert here == pytest.approx(result["metrics"][metric], abs=0.01)
        assert difference == pytest.approx(here - published, abs=0.011)
    differing = {
        "count": f"count: published 50,000, here {IMAGES}"
        if protocol["count"]
        else f"count: not published, here {IMAGES}",
        "steps": "steps: published 250, here 2",
        "features": "features: published inception, here patches",
    }
    # What the experiment itself sets is as published: model, sampler, guidance, reference.
    told = [line.strip() for line in rest.partition("results: ")[0].splitlines() if line.strip()]
    assert told == [differing[key] for key in protocol if key in differing]


def test_the_check_of_the_evaluator_draws_nothing(in_process: Command) -> None:
    outcome = in_process("sample", "experiment=paper/adm256_upsampled")
    assert (outcome.code, outcome.evaluations) == (1, 0)
    assert "ckpt=null: expected a model to load" in outcome.err


def test_a_reference_that_is_nowhere_is_told_with_its_address(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluate: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path / "weights"))
    file = "VIRTUAL_lsun_cat256.npz"
    with pytest.raises(SystemExit):
        evaluate("ckpt=digits", f"reference={file}", "compare=none")
    error = capsys.readouterr().err
    assert f"reference={file}: no such file; also looked for in {tmp_path / 'weights'}" in error
    assert f"/ref_batches/lsun/cat/{file}" in error


def test_a_model_without_classes_draws_the_classifier_s(in_process: Command) -> None:
    """ADM's unconditional model guided by its classifier, whose classes are asked for."""
    guided = ("ckpt=ADM-256-uncond", "classes=[3,999]", "num_images=2", "sampler=ddpm", *SHORT)
    classifier = "guidance.classifier.classifier=ADM-classifier-128"
    drawn = {}
    for scale in (10, 2000):
        outcome = in_process("sample", f"classifier_scale={scale}", classifier, *guided)
        assert outcome.code == 0, outcome.err
        lines = (outcome.folder() / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["label"] for line in lines] == [3, 999]
        files = sorted((outcome.folder() / "images").glob("*.png"))
        drawn[scale] = [np.asarray(Image.open(file)) for file in files]
    assert all((a != b).any() for a, b in zip(drawn[10], drawn[2000], strict=True))


def test_too_few_images_for_neighbours_are_refused_before_drawing(
    tmp_path: Path, evaluate: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate("ckpt=digits", "num_images=3", "steps=2", "compare=none")
    error = capsys.readouterr().err
    assert "3 images: precision and recall look at k=3 neighbours" in error
    assert "metrics=[fid,sfid,is]" in error
    assert not (tmp_path / "outputs").exists()
