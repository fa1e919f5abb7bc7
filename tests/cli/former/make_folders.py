"""Make the folders of former.zip and names.json, with the code of the commit they are to be of.

    git worktree add FOLDER COMMIT && cp -r tests/cli/former FOLDER/tests/cli
    cd FOLDER && PYTHONPATH=. python tests/cli/former/make_folders.py TARGET

TARGET then holds both files. Those beside this script are of 7d12afb, the last commit whose
identities named classes by where their code lay; they are made once, since what they prove is that
later code goes on with them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from commands import DRAWN, FOUR_METRICS, NAMED, SWEPT, TRAINED
from hydra import compose, initialize_config_dir

from sag_dit.cli import evaluate, sample, train
from sag_dit.cli.app import config_folder, launch, quoted

KEPT = (
    "config.yaml",
    "[0-9]*.png",
    "*.npz",
    "*.ckpt",
    "*.safetensors",
    "config.json",
    "[0-9a-f]*.json",
)
"""What is needed to go on: no page, no table."""


def named(commands: Sequence[str], runs: dict[str, str]) -> list[str]:
    """Return arguments with the folders of training runs."""
    return [each.format(**runs) for each in commands]


def names(runs: dict[str, str]) -> dict[str, list[object]]:
    """Return the folder, or the records, that each command of NAMED has."""
    from sag_dit.cli.measurements import make_measurements
    from sag_dit.cli.rows import make_rows

    found: dict[str, list[object]] = {"sample": [], "train": [], "evaluate": []}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for arguments in NAMED["sample"]:
            config = compose("sample", [quoted(each) for each in named(arguments, runs)])
            found["sample"].append(str(sample.make_plan(config).folder.path))
        for arguments in NAMED["train"]:
            config = compose("train", list(arguments))
            found["train"].append(str(train.run_folder(config)))
        for arguments in NAMED["evaluate"]:
            rows = make_rows(compose("evaluate", [*arguments]), None)
            measurements = make_measurements(rows, torch.device("cpu"))
            found["evaluate"].append([each.identity for each in measurements])
            found["reference"] = [measurements[0].setup.reference_sha256]
    return found


def make() -> None:
    """Run every command half way, in the working directory."""
    runs = {}
    for name, arguments in TRAINED.items():
        launch("train", train.run_train, [*arguments, "max_steps=2"])
        (runs[name],) = map(str, Path("outputs/train").glob(f"{name}-*"))
    places = {}
    for name, arguments in DRAWN.items():
        before = set(Path("outputs").glob("sample/*"))
        launch("sample", sample.run_sample, [*named(arguments, runs), "num_images=2"])
        (place,) = set(Path("outputs").glob("sample/*")) - before
        places[name] = str(place)
    for arguments in (SWEPT, FOUR_METRICS):
        evaluate.start(arguments)
    Path("places.json").write_text(json.dumps({**runs, **places}, indent=1) + "\n")
    Path("names.json").write_text(json.dumps(names(runs), indent=1) + "\n")


def pack(file: Path) -> None:
    """Put what is needed of the working directory into a zip."""
    kept = {each for name in KEPT for each in Path("outputs").rglob(name)}
    with zipfile.ZipFile(file, "w") as packed:
        for each in sorted({*kept, Path("places.json")}):
            entry = zipfile.ZipInfo(each.as_posix())
            packed.writestr(entry, each.read_bytes(), zipfile.ZIP_DEFLATED)


def main(target: Path) -> None:
    """Write both files to ``target``."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["make_folders.py"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAG_DIT_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        make()
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy("names.json", target)
        pack(target / "former.zip")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
