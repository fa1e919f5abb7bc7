"""Draw the pictures of README and docs: ``python -m benchmarks.pictures [--model digits]``.

Without ``--model`` those that are there are drawn again, if what goes into them has changed. Each
is what ``sample.py`` leaves. Beside it, in a JSON file of its name, stands what went into it: the
arguments, a hash of all that determines pixels (weights and settings), and one of the code that
lays out the picture. ``tests/test_pictures.py`` compares these with what would go in today, so that
no picture shows what the code no longer draws; pixels, which differ between processors, are never
compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sag_dit.cli import sample
from sag_dit.cli.composing import compose, config_folder
from sag_dit.cli.presets import with_presets
from sag_dit.identity import digest
from sag_dit.output.telling import how

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CLASSES = {
    "emoji": "happy face,animal face,person,worker,athlete,monster,vehicle,plant,place,heart,"
    "fruit or vegetable,flag"
}
"""What a model's picture shows; of one that is not named here, its first classes."""
CODE = ("gallery", "sheet")
"""Modules of ``sag_dit/output`` that lay out pictures."""


@dataclass(frozen=True)
class Picture:
    """One picture: the file of a run's folder that is shown, and the run's arguments.

    Example:
        >>> pictures("digits")["digits"].file
        'grid.png'
    """

    file: str
    arguments: Sequence[str]


def pictures(model: str) -> dict[str, Picture]:
    """Return the pictures of a bundled model by name: CFG beside SAG, and what SAG sees."""
    rows: Any = yaml.safe_load((config_folder() / f"compare/{model}.yaml").read_text("utf-8"))

    def asked(row: str, *more: str) -> list[str]:
        return [f"ckpt={model}", *(f"{key}={value}" for key, value in rows[row].items()), *more]

    classes = [f"classes=[{CLASSES[model]}]"] if model in CLASSES else []
    return {
        model: Picture("grid.png", asked("cfg_sag", "num_images=12", *classes)),
        f"{model}_attention": Picture(
            "attention/000000.png", asked("sag", "num_images=1", "maps=true", *classes)
        ),
    }


def ingredients(picture: Picture) -> dict[str, Any]:
    """Return what goes into a picture; nothing is drawn."""
    config = compose("sample", with_presets("sample", picture.arguments))
    plan = sample.make_plan(config, config.num_images, None)
    sources = [(ROOT / f"sag_dit/output/{name}.py").read_text("utf-8") for name in CODE]
    return {
        "file": picture.file,
        "arguments": list(picture.arguments),
        "pixels": digest(plan.pixels),
        "words": how(sample.recipe_of(config, plan), plan.model.denoiser),
        "code": hashlib.sha256("\0".join(sources).encode()).hexdigest(),
    }


def recorded(folder: Path = IMAGES) -> dict[str, Mapping[str, Any]]:
    """Return what is written beside the pictures of a folder, by their names.

    Plots of what was measured are left out: they are none of a run's files.
    """
    known = {
        file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))
    }
    return {name: each for name, each in known.items() if "file" in each}


def draw(name: str, picture: Picture, folder: Path = IMAGES) -> Path:
    """Draw a picture, and write what went in beside it."""
    with tempfile.TemporaryDirectory() as place:
        here = [f"out={place}", "trainer.accelerator=cpu", "trainer.devices=1"]
        sample.main([*picture.arguments, *here])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(place) / picture.file, folder / f"{name}.png")
    text = json.dumps(ingredients(picture), indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder / f"{name}.png"


def main() -> None:
    """Draw the pictures whose ingredients have changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="draw those of this bundled model")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    options = parser.parse_args()
    known = recorded()
    there = {name: Picture(each["file"], each["arguments"]) for name, each in known.items()}
    for name, picture in (pictures(options.model) if options.model else there).items():
        if options.all or known.get(name) != ingredients(picture):
            print(f"picture: {draw(name, picture)}")


if __name__ == "__main__":
    main()
