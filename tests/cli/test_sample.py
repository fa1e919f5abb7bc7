"""``sample.py``: which files it leaves, and that an image depends on its request alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sag_dit
from tests.closeness import places_are_alike

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_leaves_the_files_as_designed_and_nothing_else(
    sample: Command, contents: Contents, tmp_path: Path
) -> None:
    outcome = sample("num_images=3", "gallery.num=2", "npz=true")
    assert outcome.code == 0, outcome.err
    folder = outcome.folder()
    assert re.fullmatch(r"outputs/sample/tiny-[0-9a-f]{8}", folder.as_posix())
    assert set(contents(tmp_path)) == {
        f"{folder.as_posix()}/{name}"
        for name in (
            "config.yaml",
            "grid.png",
            "index.html",
            "journal.jsonl",
            "manifest.jsonl",
            "samples.npz",
            *(f"images/00000{i}.png" for i in range(3)),
            *(f"unguided/00000{i}.png" for i in range(2)),
            *(f"maps/00000{i}.npz" for i in range(2)),
        )
    }
    last = outcome.out.splitlines()[-1]
    assert last == f"gallery: {(tmp_path / folder / 'index.html').resolve()}"
    assert "3/3" in outcome.err


def test_gallery_num_0_leaves_no_gallery(sample: Command, contents: Contents) -> None:
    outcome = sample("num_images=2", "gallery.num=0")
    texts = {"config.yaml", "journal.jsonl", "manifest.jsonl"}
    names = {*texts, "images/000000.png", "images/000001.png"}
    assert set(contents(outcome.folder())) == names
    assert "gallery" not in outcome.out


def test_config_yaml_holds_the_resolved_configuration(sample: Command) -> None:
    folder = sample("num_images=1", "sag_scale=0.7", "guidance.sag.layer=blocks.2").folder()
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "${" not in text
    record = yaml.safe_load(text)
    assert record["config"]["guidance"]["sag"]["scale"] == 0.7
    assert record["config"]["out"] == str(folder)
    assert record["settings"]["guidance"]["sag"]["layer"] == "blocks.2.attn"
    assert record["settings"]["guidance"].keys() == {"sag"}  # CFG and blur are off


def test_manifest_has_a_row_for_every_image(sample: Command) -> None:
    folder = sample("num_images=3", "classes=[7,2]", "seed=5").folder()
    rows = manifest(folder)
    assert [(row["index"], row["seed"], row["label"], row["class"]) for row in rows] == [
        (0, 5, 7, "7"),
        (1, 5, 2, "2"),
        (2, 5, 7, "7"),
    ]
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        assert row["file"] == f"images/{row['index']:06d}.png"
        assert row["sha256"] == hashlib.sha256(data).hexdigest()


def test_npz_is_what_the_adm_evaluator_reads(sample: Command) -> None:
    folder = sample("num_images=3", "gallery.num=0", "npz=true").folder()
    with np.load(folder / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (3, 8, 8, 3)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(image, pixels(folder / f"images/{index:06d}.png"))
    assert images.std() > 10  # pictures, not one flat colour


def test_npz_of_grey_images_has_three_equal_channels(
    in_process: Command, save_official: Callable[..., Path], tmp_path: Path
) -> None:
    grey = save_official(tmp_path / "grey.pt", in_channels=1)
    arguments = ("steps=2", "num_images=2", "batch_size=2", "npz=true")
    folder = in_process("sample", f"ckpt={grey}", *arguments).folder()
    with np.load(folder / "samples.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (2, 8, 8, 3)
    grey_image = pixels(folder / "images/000001.png")
    assert grey_image.shape == (8, 8)  # the file itself stays grey
    for channel in range(3):
        np.testing.assert_array_equal(images[1, ..., channel], grey_image)


def test_the_same_command_again_draws_nothing(sample: Command, contents: Contents) -> None:
    first = sample("num_images=3", "npz=true")
    before = contents(first.folder())
    again = sample("num_images=3", "npz=true")
    # Two compute batches of 2; 4 steps of SAG's two rows, and the unguided twins' 4 steps.
    assert first.evaluations == 2 * 2 * (4 * 2 + 4)
    assert again.evaluations == 0
    # Nor does it cost what twins and padding did.
    told = first.out.splitlines()
    assert again.out.splitlines() == [line for line in told if not line.startswith(" ")]
    assert contents(first.folder()) == before


def test_more_images_later_keep_the_earlier_ones(sample: Command, contents: Contents) -> None:
    folder = sample("num_images=3", "gallery.num=0").folder()
    before = contents(folder / "images")
    more = sample("num_images=6", "gallery.num=0")
    after = contents(folder / "images")
    assert more.folder() == folder
    assert more.evaluations == 2 * 2 * 4 * 2  # three new images: two compute batches
    assert len(after) == 6
    assert before.items() < after.items()
    assert len(manifest(folder)) == 6


def test_deleted_images_and_twins_are_drawn_again_the_same(
    sample: Command, contents: Contents, tiny: Path
) -> None:
    """Where the processor has it that a place changes last bits, a pixel may be one level off."""
    folder = sample("num_images=6").folder()
    before = contents(folder)
    # Other neighbours, another place in the batch: 1 was second and becomes first, 4 second.
    gone = [folder / f for f in ("images/000001.png", "images/000004.png", "unguided/000005.png")]
    seen = [pixels(file).astype(int) for file in gone]
    for file in gone:
        file.unlink()
    again = sample("num_images=6")
    assert 0 < again.evaluations < 3 * 2 * (4 * 2 + 4)
    assert max(np.abs(pixels(f) - was).max() for f, was in zip(gone, seen, strict=True)) <= 1
    network = sag_dit.load(tiny).denoiser.network
    x = torch.ones(1, 3, 8, 8).cumsum(-1).sin()
    if places_are_alike(network, x, torch.tensor([500]), torch.tensor([1]), rows=2):
        assert contents(folder) == before


@pytest.mark.parametrize("num_images", [1, 5])
def test_neighbours_and_padding_do_not_change_an_image(
    sample: Command, contents: Contents, num_images: int
) -> None:
    reference = contents(sample("num_images=2", "out=reference", "cfg_scale=1.5").folder())
    other = contents(sample(f"num_images={num_images}", "out=other", "cfg_scale=1.5").folder())
    for name in ("images/000000.png", "unguided/000000.png", "maps/000000.npz"):
        assert other[name] == reference[name]


def test_twin_is_the_same_noise_without_guidance(sample: Command, contents: Contents) -> None:
    guided = sample("num_images=3", "out=guided", "cfg_scale=1.5").folder()
    unguided = sample("num_images=3", "out=plain", "sag_scale=0", "cfg_scale=1").folder()
    twins = contents(guided / "unguided")
    assert len(twins) == 3
    assert twins == contents(unguided / "images")
    assert not set(twins.values()) & set(contents(guided / "images").values())


def test_beside_another_method_there_is_a_twin_without_sag(
    sample: Command, contents: Contents
) -> None:
    both = sample("num_images=3", "gallery.num=2", "cfg_scale=1.5").folder()
    cfg = sample("num_images=3", "gallery.num=0", "sag_scale=0", "cfg_scale=1.5").folder()
    twins = contents(both / "without_sag")
    assert twins.keys() == {"000000.png", "000001.png"}
    assert twins.items() < contents(cfg / "images").items()


def test_a_finished_folder_without_that_twin_is_left_as_it_is(
    sample: Command, contents: Contents
) -> None:
    folder = sample("num_images=2", "cfg_scale=1.5").folder()
    shutil.rmtree(folder / "without_sag")
    before = contents(folder / "images")
    again = sample("num_images=2", "cfg_scale=1.5")
    assert (again.folder(), again.evaluations) == (folder, 0)
    assert contents(folder / "images") == before and not (folder / "without_sag").exists()


def test_scales_are_aliases_of_the_terms(sample: Command, contents: Contents) -> None:
    short = sample("num_images=2", "sag_scale=0.5", "cfg_scale=2", "blur_scale=0.25").folder()
    long = sample(
        "num_images=2",
        "guidance.sag.scale=0.5",
        "guidance.cfg.scale=2",
        "guidance.blur.scale=0.25",
    ).folder()
    assert short == long
    plain = sample("num_images=2", "sag_scale=0").folder()
    assert contents(plain / "images") != contents(short / "images")


def test_the_cost_of_padding_and_twins_is_told_before_anything_is_drawn(
    sample: Command, contents: Contents
) -> None:
    once = sample("num_images=3", "gallery.num=2", "batch_size=4", "sag_scale=1", "steps=2")
    assert once.out.splitlines()[:3] == [
        "cost: 2 x unguided, 4 passes of the network for each image instead of 2",
        "      the 2 twins of the gallery add 50 % to that; gallery.num=0 leaves them out",
        "      3 images cost as much as 4: batches are always full; batch_size=1 costs less, its "
        "images differ in rounding",
    ]
    # What the line says is what is computed: three images as one full batch, twins as another.
    assert once.evaluations == 4 * (4 + 2)
    # Nothing is left to draw, so nothing costs more than a look.
    again = sample("num_images=3", "gallery.num=2", "batch_size=4", "sag_scale=1", "steps=2")
    assert [line[:5] for line in again.out.splitlines()] == ["cost:", "image", "galle"]


def test_shared_prefixes_draw_the_same_for_less(sample: Command) -> None:
    """In a folder of its own, since an image may round differently."""
    asked = (
        "num_images=4",
        "gallery.num=2",
        "sag_scale=0",
        "pag_scale=0.7",
        "guidance.pag.layers=2",
    )
    apart, shared = sample(*asked), sample(*asked, "share_prefixes=true")
    assert "cost: 2 x unguided" in apart.out
    # Of three blocks the last is evaluated for both.
    assert "cost: 1.33 x unguided" in shared.out
    assert "saves nothing" not in shared.out + shared.err
    config = yaml.safe_load((shared.folder() / "config.yaml").read_text())["config"]
    assert config["share_prefixes"] is True
    assert config["cost"]["rows_per_step"] == pytest.approx(4 / 3)
    assert "share_prefixes=true" in (shared.folder() / "index.html").read_text()
    assert shared.folder() != apart.folder()
    for each in ("images/000000.png", "images/000003.png", "unguided/000001.png"):
        images = [pixels(run.folder() / each).astype(int) for run in (apart, shared)]
        assert np.abs(images[0] - images[1]).max() <= 1
    # In its own folder it finds its own images.
    assert sample(*asked, "share_prefixes=true").evaluations == 0


def test_where_nothing_can_be_shared_it_says_so(sample: Command) -> None:
    outcome = sample("num_images=1", "gallery.num=0", "share_prefixes=true")
    line = "share_prefixes=true saves nothing here: no method that is on changes the network"
    assert outcome.out.count(line) == 1


def test_a_cache_is_a_set_of_its_own_and_costs_what_runs(sample: Command) -> None:
    asked = ("num_images=2", "gallery.num=2", "batch_size=2", "sag_scale=1", "steps=4")
    plain, cached = sample(*asked), sample(*asked, "cache.every=2")
    assert "cost: 2 x unguided" in plain.out
    assert "cost: 4 passes of the network for each image" in cached.out
    assert cached.folder() != plain.folder()
    config = yaml.safe_load((cached.folder() / "config.yaml").read_text())
    assert config["config"]["cache"] == {"every": 2, "order": 0}
    assert "cache.every=2" in (cached.folder() / "index.html").read_text()
    assert sample(*asked, "cache.every=2").evaluations == 0
    # At its neutral value it is the set of before, whatever else is stated.
    assert sample(*asked, "cache.every=1", "cache.order=2").evaluations == 0


def test_a_cache_that_cannot_be_is_refused_in_a_sentence(sample: Command) -> None:
    for wrong, told in (
        (("cache.every=0",), "cache.every=0: expected"),
        (("cache.order=5",), "cache.order=5: expected"),
        (("cache.every=2", "share_prefixes=true"), "cache.every=2 beside share_prefixes=true"),
    ):
        outcome = sample("num_images=1", *wrong)
        assert outcome.code == 1 and told in outcome.err


def test_a_profile_names_every_part_and_changes_no_pixel(
    sample: Command, contents: Contents
) -> None:
    plain = sample("num_images=4", "gallery.num=2", "out=plain")
    told = sample("num_images=4", "gallery.num=2", "out=told", "profile=true")
    assert "where" not in plain.out
    kept = [contents(run.folder()) for run in (plain, told)]
    images = [{k: v for k, v in each.items() if k.endswith(".png")} for each in kept]
    assert images[0] == images[1] and len(images[0]) == 4 + 2 + 1
    # Every part is named, and they add up to the whole.
    lines = told.out.splitlines()
    (start,) = [place for place, line in enumerate(lines) if line.startswith("where ")]
    shown = {}
    for line in lines[start + 1 :]:
        if found := re.fullmatch(r"  (\D.*?) +([\d.]+) s +\d+ %", line):
            shown[found[1]] = float(found[2])
    assert set(shown) == {
        "network, round 1",
        "network, round 2",
        "guidance",
        "capture",
        "sampler",
        "decode",
        "wait",
        "everything else",
    }
    total = float(lines[start].split()[1])
    assert sum(shown.values()) == pytest.approx(total, abs=0.01 * len(shown))
    assert re.search(r"on another thread: encode [\d.]+ s, write [\d.]+ s", told.out)
    assert f"network: {told.evaluations} rows of " in told.out
    assert told.evaluations == plain.evaluations
