"""``sample.py``: what can be asked for, in which precision and with which sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sag_dit
from sag_dit.cli.composing import compose, config_folder
from sag_dit.cli.keys import Sample
from sag_dit.cli.sample import Plan, make_plan

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def plan_of(ckpt: Path, *overrides: str) -> Plan:
    config: Sample = compose("sample", [f"ckpt={ckpt}", *overrides])
    return make_plan(config, config.num_images, config.out)


SaveOfficial = Callable[..., Path]


def named_model(save: SaveOfficial, file: Path, names: Sequence[str]) -> Path:
    """A small model whose classes have names."""
    stated = {
        "model": {"num_classes": len(names)},
        "process": {"schedule": "linear", "num_timesteps": 1000},
        "kind": "eps",
        "x_0_range": [-1, 1],
        "class_names": list(names),
    }
    return save(file, num_classes=len(names), stated=stated)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("null", [0, 1, 2, 0]),
        ("1", [1, 1, 1, 1]),
        ("[2,0]", [2, 0, 2, 0]),
        ("tench", [0, 0, 0, 0]),
        ("[great white shark,1]", [2, 1, 2, 1]),
    ],
)
def test_classes_by_number_and_by_name(
    save_official: SaveOfficial, tmp_path: Path, classes: str, labels: list[int]
) -> None:
    names = ["tench", "goldfish", "great white shark"]
    ckpt = named_model(save_official, tmp_path / "fish.pt", names)
    plan = plan_of(ckpt, "num_images=4", f"classes={classes}")
    assert [request.label for request in plan.requests] == labels
    assert plan.model.class_names == tuple(names)


def test_a_number_means_one_class_at_every_door(
    save_official: SaveOfficial, tmp_path: Path
) -> None:
    """Folders 0 to 11 are sorted as text, so that the folder 2 is number 4."""
    folders = sorted(map(str, range(12)))
    ckpt = named_model(save_official, tmp_path / "folders.pt", folders)
    file = tmp_path / "wanted.csv"
    rules = []
    for classes, line, label in (("[2]", "0,2", 2), ('["2"]', '0,"2"', 4), ("[0]", "0,0", 0)):
        assert [each.label for each in plan_of(ckpt, f"classes={classes}").requests] == [label] * 16
        file.write_text(f"{line}\n")
        plan = plan_of(ckpt, f"requests={file}")
        assert [each.label for each in plan.requests] == [label]
        rules.append(plan.pixels["request"])
    # Folders of former versions, where such a line meant the class of that name, are not mixed.
    assert ["numbers" in rule for rule in rules] == [True, False, False]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ("[日本]", ["日本"]),
        ("[c#d,a=b]", ["c#d", "a=b"]),
        ("[jack-o'-lantern, it's]", ["jack-o'-lantern", "it's"]),
        ("""['a, b',"x]y",plain]""", ["a, b", "x]y", "plain"]),
        ("[a:b (c),d e]", ["a:b (c)", "d e"]),
        ("c#d", ["c#d"]),
        ("[1,null-and-void]", [1, "null-and-void"]),
    ],
)
def test_names_of_classes_may_hold_anything(classes: str, names: list[str | int]) -> None:
    config: Sample = compose("sample", [f"classes={classes}"])
    assert (config.classes if isinstance(config.classes, list) else [config.classes]) == names


def test_random_classes_follow_seed_and_index(tiny: Path) -> None:
    def labels(*overrides: str) -> list[int]:
        return [r.label for r in plan_of(tiny, "classes=random", *overrides).requests]

    many = labels("num_images=400")
    assert labels("num_images=7") == many[:7]
    assert labels("num_images=400", "seed=1") != many
    counts = np.bincount(many, minlength=10)
    assert counts.min() > 15 and counts.max() < 75  # 40 expected of each


REQUESTS = "seed,class\n11,3\n12, 4\n\n11,3\n"


def test_requests_bring_their_own_seeds_and_classes(sample: Command, tmp_path: Path) -> None:
    (tmp_path / "wanted.csv").write_text(REQUESTS)
    outcome = sample("requests=wanted.csv", "gallery.num=0")
    assert outcome.code == 0, outcome.err
    folder = outcome.folder()
    rows = manifest(folder)
    assert [(row["seed"], row["label"]) for row in rows] == [(11, 3), (12, 4), (11, 3)]
    # The same line is the same image, wherever it stands.
    assert rows[0]["sha256"] == rows[2]["sha256"] != rows[1]["sha256"]
    # And it is image 0 of a set with that seed.
    single = sample("seed=12", "classes=4", "num_images=1", "gallery.num=0").folder()
    assert manifest(single)[0]["sha256"] == rows[1]["sha256"]


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("1,3\n2\n", 2, "'2'"),
        ("1,3\nx,3\n", 2, "'x,3'"),
        ("seed,class\n1,3\n\n4,12\n", 4, "'4,12'"),
        ("1,3,5\n", 1, "'1,3,5'"),
        ("1,cat\n", 1, "'1,cat'"),
        ("1,2\n-1,3\n", 2, "'-1,3'"),
    ],
)
def test_a_wrong_line_of_requests_is_named(
    sample: Command, tmp_path: Path, text: str, line: int, found: str
) -> None:
    (tmp_path / "wanted.csv").write_text(text)
    outcome = sample("requests=wanted.csv", "out=o")
    assert outcome.code == 1
    assert f"wanted.csv, line {line}: expected 'seed,class', found {found}" in outcome.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_draws_nearly_the_same(
    sample: Command, tmp_path: Path, precision: str
) -> None:
    arguments = ("num_images=2", "sag_scale=0", "gallery.num=0")
    full = sample(*arguments, "out=full").folder()
    half = sample(*arguments, "out=half", f"trainer.precision={precision}")
    assert half.code == 0, half.err
    left, right = (
        pixels(folder / "images/000001.png").astype(float) for folder in (full, half.folder())
    )
    assert 0 < abs(left - right).mean() < 5


def test_python_function_draws_the_same_images(sample: Command, tiny: Path) -> None:
    folder = sample(
        "num_images=3", "classes=[3,7,0]", "seed=9", "cfg_scale=1.5", "sag_scale=0.8"
    ).folder()
    images = sag_dit.sample(
        sag_dit.load(tiny),
        classes=[3, "7", 0],
        guidance=[sag_dit.CFG(scale=1.5), sag_dit.SAG(scale=0.8)],
        steps=4,
        seed=9,
        batch_size=2,
    )
    for index, image in enumerate(images):
        expected = pixels(folder / f"images/{index:06d}.png")
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


SAMPLERS = sorted(file.stem for file in (config_folder() / "sampler").glob("*.yaml"))
FLOW = [name for name in SAMPLERS if name.endswith("_flow")]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in FLOW])
def test_every_sampler_draws_with_sag(sample: Command, contents: Contents, sampler: str) -> None:
    outcome = sample("steps=10", "num_images=1", f"sampler={sampler}")
    assert outcome.code == 0, outcome.err
    files = contents(outcome.folder())
    assert files["images/000000.png"] != files["unguided/000000.png"]
    assert pixels(outcome.folder() / "images/000000.png").std() > 1


@pytest.mark.parametrize("sampler", FLOW)
def test_samplers_of_flow_models_are_refused_before_anything_is_written(
    sample: Command, tmp_path: Path, sampler: str
) -> None:
    outcome = sample("num_images=1", f"sampler={sampler}", "out=o")
    assert outcome.code == 1
    assert "flow" in outcome.err
    assert not (tmp_path / "o").exists()
