"""``evaluate.py``: the table, and the same numbers for images drawn on the fly and on disk."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sag_dit
from sag_dit.cli import sample as sample_command
from sag_dit.cli.app import launch
from sag_dit.cli.composing import changed
from sag_dit.cli.keys import Evaluate as Keys
from sag_dit.cli.measurements import make_measurements
from sag_dit.cli.rows import Configured
from sag_dit.data.splits import split
from sag_dit.evaluation.classifier import bundled_classifier
from sag_dit.evaluation.reference import load_reference
from sag_dit.evaluation.suite import Suite
from sag_dit.guidance import CFG
from sag_dit.studio.opening import open_folder
from sag_dit.study import measurement, setup
from tests.cli.offline import records, staged_tables

Evaluate = Callable[..., Any]
CPU = torch.device("cpu")
METRICS = ["fid", "sfid", "is", "precision", "recall"]


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Inception Score is taken over splits of 100 images."""
    for module in (setup, measurement):
        monkeypatch.setattr(module, "SPLIT_SIZE", 100)


def write_set(images: torch.Tensor, labels: torch.Tensor | None, file: Path) -> Path:
    arrays = {} if labels is None else {"arr_1": labels.numpy()}
    np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return file


def test_a_set_in_the_order_of_its_classes_says_so(
    evaluate: Evaluate, small_splits: None, tmp_path: Path
) -> None:
    images, labels = split("digits:report")
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = labels.argsort(stable=True)
    files = [
        write_set(images[mixed], labels[mixed], tmp_path / "mixed.npz"),
        write_set(images[order], labels[order], tmp_path / "ordered.npz"),
        write_set(images[order], None, tmp_path / "unknown.npz"),
        write_set(images[order][:100], labels[order][:100], tmp_path / "one split.npz"),
    ]
    names = ",".join(map(str, files))
    command = (f"samples=[{names}]", "features=digits", "metrics=[is]", "trainer.accelerator=cpu")
    outcome = evaluate(*command)
    scores = [result["metrics"]["is"] for result in outcome.results]
    assert scores[1] < 0.8 * scores[0]
    told = [
        any("come class by class" in warning for warning in result["warnings"])
        for result in outcome.results
    ]
    assert told == [False, True, False, False]
    assert "ordered.npz: is: the images come class by class" in outcome.out
    assert "come class by class" in (outcome.folder / "index.html").read_text()
    # Numbers that were measured before say so too.
    for record in Path("outputs/evaluate/finished").glob("*.json"):
        values = json.loads(record.read_text())
        assert not any("class by class" in warning for warning in values["warnings"])
    assert "come class by class" in evaluate(*command).out


def test_images_that_are_drawn_class_by_class_say_so(
    draw: Evaluate, small_splits: None, tmp_path: Path
) -> None:
    for name, labels in (
        ("in turn", "0123456789" * 12),
        ("ordered", "".join(c * 12 for c in "0123456789")),
    ):
        (tmp_path / f"{name}.csv").write_text("\n".join(f"{i},{c}" for i, c in enumerate(labels)))
        outcome = draw(
            f"requests={tmp_path / name}.csv",
            "num_images=null",
            "classes=null",
            "compare=none",
            "steps=1",
        )
        assert outcome.code == 0, outcome.err
        assert ("come class by class" in outcome.out) == (name == "ordered")


def test_a_set_over_another_background_is_another_set(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for place, image in enumerate(split("digits:report")[0][:20, 0].numpy()):
        alpha = Image.fromarray(np.full((8, 8), 255 * (place > 9), np.uint8))
        Image.merge("LA", (Image.fromarray(image), alpha)).save(
            tmp_path / "set" / f"{place:02d}.png"
        )
    (tmp_path / "set" / "more.gif").write_bytes(b"")
    command = ("samples=set", "features=digits", "metrics=[fid]", "trainer.accelerator=cpu")
    white, black = (evaluate(*command, f"background={each}") for each in ("white", "black"))
    assert white.results[0]["metrics"] != black.results[0]["metrics"]
    assert "left out are 1 (.gif is not read): more.gif" in white.out
    refused = evaluate(*command, "background=see-through")
    assert refused.code == 1 and "background=see-through: expected the name" in refused.err


def test_the_table_of_a_model(draw: Evaluate) -> None:
    outcome = draw()
    results = outcome.results
    names = [result["name"] for result in results]
    assert names == ["unguided", "CFG 1.5", "SAG 1", "CFG 1.5 + SAG 1", "blur 1"]
    for name in names:
        assert re.search(rf"^{re.escape(name)} +\d", outcome.out, re.MULTILINE)
    assert all(list(result["metrics"]) == METRICS for result in results)
    assert all(list(result["spread"]) == METRICS for result in results)
    assert len({json.dumps(result["metrics"]) for result in results}) == 5
    assert [line for line in outcome.out.splitlines() if line.startswith("cost")] == [
        "cost of unguided: 2 passes of the network for each image",
        "cost of CFG 1.5, SAG 1, blur 1: 2 x unguided, 4 passes of the network for each image "
        "instead of 2",
        "cost of CFG 1.5 + SAG 1: 3 x unguided, 6 passes of the network for each image instead "
        "of 2",
    ]

    # One row by hand, without the command, Lightning or a rank.
    images = sag_dit.sample(
        sag_dit.load("digits"), [i % 10 for i in range(30)], guidance=[CFG(1.5)], steps=2,
        batch_size=15,
    )  # fmt: skip
    extractor = bundled_classifier("digits")
    suite = Suite(extractor, load_reference("digits:report", extractor), groups=30)
    suite.update(images, torch.arange(30))
    assert results[1]["metrics"] == pytest.approx(suite.compute(), rel=1e-6)
    spread = {name: value for name, (_, value) in suite.confidence(10).items()}
    assert results[1]["spread"] == pytest.approx(spread, rel=1e-4)

    # The first images are on the page, each with its number.
    for index in range(2):
        shot = Path(f"outputs/evaluate/finished/{results[1]['identities'][0]}/{index:06d}.png")
        with Image.open(shot) as image:
            np.testing.assert_array_equal(np.asarray(image), images[index, 0].numpy())
    page = (outcome.folder / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 10


def test_every_number_has_its_facts_beside_it(draw: Evaluate) -> None:
    outcome = draw("cfg_scale=1.5", "confidence.repeats=0", "sampler=ddim", "sampler.eta=0.5")
    (result,) = outcome.results
    facts = result["facts"]
    weights = Path(sag_dit.__file__).parent / "checkpoints" / "digits" / "model.safetensors"
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["count"], facts["steps"], facts["sampler"]) == (30, 2, "DDIM")
    assert facts["sampler_options"] == {"eta": 0.5} == open_folder(outcome.folder).options
    assert facts["sample_labels"] == {"classes": 10, "fewest": 3, "most": 3}
    assert facts["guidance"] == "CFG 1.5"
    cost = {"steps": 2, "rounds_per_step": 1.0, "rows_per_step": 2.0}
    assert facts["cost"] == {**cost, "rows_of_others_per_step": 0.0}
    assert facts["features"] == "digits"
    assert facts["features_protocol"]["resize"] == "none"
    assert len(facts["features_protocol"]["weights"]) == 64
    assert (facts["reference"], facts["reference_protocol"]["count"]) == ("digits:report", 357)
    assert result["spread"] == {}
    with (outcome.folder / "results.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    for name in METRICS:
        assert float(row[name]) == result["metrics"][name]
    assert row["reference_protocol.count"] == "357"
    assert row["cost.rows_per_step"] == "2.0"
    assert row["features_protocol.weights"] == facts["features_protocol"]["weights"]


@pytest.mark.usefixtures("wandb_offline")
def test_numbers_go_to_weights_and_biases(draw: Evaluate, tmp_path: Path) -> None:
    few = ("metrics=[fid,is]", "confidence.repeats=0", "plots=false", "seeds=2")
    outcome = draw("-m", "cfg_scale=1,1.5", *few, "logger=wandb", f"out={tmp_path / 'o'}")
    results = outcome.results
    import wandb

    wandb.finish()  # which writes what is still on its way
    (run,) = (tmp_path / "o").glob("wandb/offline-run-*")
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records(run)
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert summary["CFG 1.5/fid"] == pytest.approx(results[1]["metrics"]["fid"])
    ((table, _),) = staged_tables(tmp_path / "staged")
    assert table["columns"] == ["setting", "fid", "is", "fid_spread", "is_spread"]
    assert [row[0] for row in table["data"]] == ["unguided", "CFG 1.5"]
    assert table["data"][1][3] == pytest.approx(results[1]["spread"]["fid"])


def test_what_is_measured_is_not_measured_again(draw: Evaluate) -> None:
    once = draw("cfg_scale=2.0")
    assert once.evaluations == 2 * 30 * 2
    assert "cost: 2 x unguided, " in once.out
    # A record of a version that told fewer facts serves as well.
    (file,) = Path("outputs/evaluate/finished").glob("*.json")
    record = json.loads(file.read_text())
    del record["facts"]["cost"]
    file.write_text(json.dumps(record))
    again = draw("cfg_scale=2", "gallery.num=1")
    assert again.evaluations == 0 and "cost" not in again.out
    assert again.results == once.results
    # A file that was cut short is not taken for a result.
    file.write_text(file.read_text()[:100])
    broken = draw("cfg_scale=2")
    assert broken.code == 1
    assert "delete it and repeat the command" in broken.err


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("cfg_scale", 1.6, False),
        ("seed", 1, False),
        ("num_images", 15, False),
        ("classes", "random", False),
        ("reference", "digits:tune", False),
        ("metrics", ["fid"], False),
        ("confidence.repeats", 5, False),
        ("guidance.cfg.scale", 1.5, True),
        ("guidance.sag.threshold", 2.0, True),  # of a term that is off
        ("keep", True, True),
        ("gallery.num", 3, True),
        ("out", "elsewhere", True),
    ],
)
def test_numbers_are_kept_by_what_determines_them(
    defaults: Keys,
    kept_references: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: object,
    same: bool,
) -> None:
    monkeypatch.setenv("SAG_DIT_CACHE", str(kept_references))
    own = {"ckpt": "digits", "cfg_scale": 1.5, "num_images": 30}
    configs = [changed("evaluate", defaults, each) for each in (own, {**own, key: value})]
    rows = [Configured("", i, {}, each) for i, each in enumerate(configs)]
    first, second = make_measurements(rows, CPU)
    assert (first.identity == second.identity) == same


def test_kept_images_are_those_of_sample_and_are_read_back(
    draw: Evaluate, evaluate: Evaluate
) -> None:
    drawn = draw("cfg_scale=1.5", "keep=true")
    (folder,) = Path("outputs/sample").iterdir()
    kept = {file.name: file.read_bytes() for file in (folder / "images").iterdir()}
    assert len(kept) == 30
    on_the_fly = draw("cfg_scale=1.5", "finished=other")
    assert on_the_fly.results[0]["metrics"] == drawn.results[0]["metrics"]
    assert on_the_fly.results[0]["spread"] == pytest.approx(drawn.results[0]["spread"], rel=1e-6)
    (identity,) = drawn.results[0]["identities"]
    for name in ("000000.png", "000001.png"):
        shots = [
            Path(f"{where}/{identity}/{name}") for where in ("outputs/evaluate/finished", "other")
        ]
        assert shots[0].read_bytes() == shots[1].read_bytes() == kept[name]

    launch("sample", sample_command.run_sample, [
        *("ckpt=digits", "steps=2", "num_images=30", "batch_size=15", "gallery.num=0"),
        *("trainer.accelerator=cpu", "cfg_scale=1.5", "sag_scale=0", "npz=true"),
    ])  # fmt: skip
    assert {file.name: file.read_bytes() for file in (folder / "images").iterdir()} == kept

    npz = folder / "samples.npz"
    stored = evaluate(f"samples=[{folder},{npz}]", "features=digits", "trainer.accelerator=cpu")
    assert [result["name"] for result in stored.results] == [str(folder), str(npz)]
    for name, value in drawn.results[0]["metrics"].items():
        assert stored.results[0]["metrics"][name] == pytest.approx(value, rel=1e-6)
    assert stored.results[0]["facts"]["sample_labels"] == {"classes": 10, "fewest": 3, "most": 3}

    (folder / "images" / "000003.png").unlink()
    again = draw("cfg_scale=1.5", "keep=true", "finished=third")
    assert again.evaluations == 15 * 2 * 2  # one compute batch, padded
    assert again.results[0]["metrics"] == drawn.results[0]["metrics"]


def test_seeds_give_mean_and_spread(draw: Evaluate) -> None:
    (result,) = draw("cfg_scale=1.5", "seeds=2", "seed=5").results
    first, second = result["seeds"]
    assert (first["seed"], second["seed"]) == (5, 6)
    for name in METRICS:
        values = [first["metrics"][name], second["metrics"][name]]
        assert result["metrics"][name] == pytest.approx(np.mean(values))
        assert result["spread"][name] == pytest.approx(np.std(values, ddof=1))
    (alone,) = draw("cfg_scale=1.5", "seed=6", "confidence.repeats=10").results
    assert alone["metrics"] == second["metrics"]


@pytest.mark.parametrize("several", [(), ("-m", "cfg_scale=1,2")], ids=["one", "several"])
@pytest.mark.usefixtures("logged_out")
def test_nobody_logged_in_is_told_before_any_image(
    draw: Evaluate, several: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = draw(*several, "logger=wandb", f"out={tmp_path / 'o'}")
    assert (outcome.code, outcome.out, outcome.evaluations) == (1, "", 0)
    assert outcome.err.startswith("error: logger=wandb: ") and outcome.err.count("\n") == 1
    assert "`wandb login`" in outcome.err and "logger.offline=true" in outcome.err
    assert not (tmp_path / "o").exists()
