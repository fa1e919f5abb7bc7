"""``search=`` at the command line: the folder's manifest, resuming, and verifiers of one's own."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from sag_dit.cli.composing import compose
from sag_dit.cli.sample import main, make_plan
from sag_dit.cli.values import make_search
from sag_dit.output.telling import Recipe, command, preset, python
from sag_dit.sampler import Ancestral
from sag_dit.search import FKSteering

QUICK = ("ckpt=digits", "num_images=3", "steps=4", "batch_size=4", "sag_scale=0")
CPU = ("trainer.accelerator=cpu", "trainer.devices=1", "gallery.num=1")
HERE = __name__


def darkest(images: Tensor, condition: Tensor, weight: float = 1.0) -> Tensor:
    return -weight * images.mean((1, 2, 3)) + 0 * condition


class Contrast:
    """A verifier that is made with an option."""

    def __init__(self, power: int = 1) -> None:
        self.power = power

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        return images.std((1, 2, 3)) ** self.power


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


FK = (
    "search=fk",
    "search.particles=2",
    "search.every=1",
    "search.temperature=0.01",
    "sampler=ddpm",
)


@pytest.mark.parametrize("search", [("search=best_of", "search.num=2"), FK], ids=["best_of", "fk"])
def test_a_run_that_lost_images_ends_with_the_same_files(
    tmp_path: Path, search: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*QUICK, *CPU, *search, f"search.verifier={HERE}.darkest", f"out={out}"]
    main(command)
    assert "images scored to choose each" in capsys.readouterr().out
    before = {file.name: file.read_bytes() for file in (out / "images").iterdir()}
    manifest, rows = (out / "manifest.jsonl").read_bytes(), rows_of(out)
    assert all(row["score"] < 0 and row["lineage"][-1][1] == row["particle"] for row in rows)
    # As after a kill: of all that was to be written one image is there, and no manifest.
    for name in ("000000.png", "000002.png"):
        (out / "images" / name).unlink()
    (out / "manifest.jsonl").unlink()
    main(command)
    assert {file.name: file.read_bytes() for file in (out / "images").iterdir()} == before
    assert (out / "manifest.jsonl").read_bytes() == manifest
    page = (out / "index.html").read_text()
    assert f"score {rows[0]['score']:.4g}" in page
    # Other settings of the search belong into another folder.
    with pytest.raises(SystemExit):
        main([*command, f"search.verifier={HERE}.Contrast"])
    assert "settings.search.verifier" in (told := capsys.readouterr().err) or "search" in told


def test_verifiers_by_name_and_by_target() -> None:
    def verifier(*arguments: str) -> Any:
        found: Any = make_search(compose("sample", ["search=best_of", *arguments]).search)
        return found.verifier

    assert verifier() == "classifier"
    assert verifier(f"search.verifier={HERE}.darkest").func is darkest
    target = f"search.verifier._target_={HERE}"
    heavy = verifier(f"{target}.darkest", "search.verifier.weight=2")
    assert heavy.func is darkest and heavy.keywords == {"weight": 2.0}
    assert verifier(f"{target}.Contrast", "search.verifier.power=2").power == 2


def test_the_command_of_a_gallery_and_the_preset_of_a_page_make_the_same_search() -> None:
    search = FKSteering(2, darkest, every=3, temperature=0.5, potential="sum")
    recipe = Recipe("digits", Ancestral(), num_classes=10, search=search)
    config = compose("sample", shlex.split(command(recipe))[2:])
    made: Any = make_search(config.search)
    assert replace(made, verifier=made.verifier.func) == search
    told = yaml.safe_load(preset(recipe))
    assert {"override /search": "fk"} in told["defaults"]
    assert told["search"]["temperature"] == 0.5 and told["search"]["potential"] == "sum"
    assert f"from {HERE} import darkest" in python(recipe)
    assert 'potential="sum", verifier=darkest)' in python(recipe)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["search=best_of", "search.verifier=clasifier"], "search.verifier=clasifier: expected cl"),
        (["search=best_of", "search.verifier=no_such.it"], "there is no module no_such"),
        (["search=best_of", "search.num=1"], "search.num=1: expected 2 or more"),
        (["search=fk"], "with sampler=ddim as it is set"),
        ([*FK, "batch_size=auto"], "batch_size=auto beside search=fk"),
        (["search._target_=fractions.Fraction"], "expected a subclass of sag_dit.sampling.Search"),
    ],
)
def test_what_cannot_be_meant_is_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_plan(compose("sample", [*QUICK, *arguments]), 3, None)


def test_without_a_search_a_folder_keeps_its_name_and_its_manifest() -> None:
    plain = make_plan(compose("sample", [*QUICK]), 3, None)
    assert "search" not in plain.pixels
    searched = make_plan(compose("sample", [*QUICK, "search=best_of"]), 3, None)
    assert searched.folder != plain.folder
    assert searched.pixels["search"]["num"] == 4
