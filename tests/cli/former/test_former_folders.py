"""Folders that were made before identities had keys go on, wherever the code lies by now.

former.zip and names.json were made by commit 7d12afb; see make_folders.py.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sag_dit.cli import evaluate
from sag_dit.cli.composing import compose
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.measurements import make_measurements
from sag_dit.cli.rows import make_rows
from sag_dit.cli.run_identity import run_folder
from sag_dit.cli.sample import make_plan
from sag_dit.denoiser import ClassConditional
from sag_dit.study import results as records
from sag_dit.study import setup as setups
from sag_dit.study.setup import Setup
from tests.cli.conftest import Command
from tests.cli.former.commands import DRAWN, FOUR, FOUR_METRICS, NAMED, ONE_ROW, SWEPT, TRAINED
from tests.identity.families import MOVABLE, moved

HERE = Path(__file__).parent
FINISHED = Path("outputs/evaluate/finished")
NAMES: dict[str, list[Any]] = json.loads((HERE / "names.json").read_text())


@pytest.fixture(autouse=True)
def code_has_moved() -> Iterator[None]:
    """All classes that a run names lie elsewhere, under other names."""
    with moved(*MOVABLE):
        yield


@pytest.fixture(autouse=True)
def same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's statistics are those of the processor on which the folders were made.

    Others round them otherwise, and a record is of one set of statistics.
    """
    (sha256,) = NAMES["reference"]
    monkeypatch.setattr(setups, "_digest", lambda _: sha256)


@pytest.fixture
def places(in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The former folders in the working directory, by what they are called."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("SAG_DIT_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(HERE / "former.zip") as packed:
        packed.extractall(tmp_path)
    found: dict[str, str] = json.loads(Path("places.json").read_text())
    return found


def named(arguments: Sequence[str], places: dict[str, str]) -> list[str]:
    """Those that name no model drew the digits, which was the default then."""
    filled = [each.format(**places) for each in arguments]
    return filled if any(each.startswith("ckpt=") for each in filled) else ["ckpt=digits", *filled]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The files below a folder: what they hold, and when they were written."""
    return {
        file.relative_to(folder).as_posix(): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


# --- sample.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DRAWN)
def test_a_folder_of_images_is_completed(
    in_process: Command, places: dict[str, str], case: str
) -> None:
    command = named(DRAWN[case], places)
    folder = Path(places[case])
    before = state(folder)
    done = in_process("sample", *command, "num_images=4")
    assert done.code == 0, done.err
    assert done.folder() == folder
    after = state(folder)
    for name in before.keys() - {"config.yaml"}:
        assert after[name] == before[name], name
    images = {name for name in after if name.startswith("images/")}
    assert images == {f"images/{index:06d}.png" for index in range(4)}

    fresh = in_process("sample", *command, "num_images=4", "out=fresh")
    # The second of two batches, and of the first the gallery's twin alone, were not drawn again.
    assert 0 < done.evaluations < fresh.evaluations
    for index in (2, 3):
        name = f"images/{index:06d}.png"
        assert Path("fresh", name).read_bytes() == after[name][0]

    (folder / "images" / "000003.png").unlink()
    again = in_process("sample", *command, "num_images=3", f"out={folder}")
    assert (again.code, again.evaluations) == (0, 0), again.err


def test_what_a_folder_holds_is_told_by_keys(in_process: Command, places: dict[str, str]) -> None:
    folder = Path(places["perturbed"])
    written = in_process("sample", *named(DRAWN["perturbed"], places), "num_images=2")
    assert (written.code, written.evaluations) == (0, 0)
    settings = yaml.safe_load((folder / "config.yaml").read_text())["settings"]
    assert {name: term["term"] for name, term in settings["guidance"].items()} == {
        name: name for name in ("blur", "pag", "seg", "slg", "tpg", "icg", "tsg")
    }
    auto = Path(places["autoguided"])
    in_process("sample", *named(DRAWN["autoguided"], places), "num_images=2")
    settings = yaml.safe_load((auto / "config.yaml").read_text())["settings"]
    assert settings["guidance"]["auto"]["worse"]["module"] == "class_conditional"
    assert settings["sampler"]["name"] == "ddim"


def test_a_former_folder_of_other_settings_is_refused(
    in_process: Command, places: dict[str, str]
) -> None:
    before = state(Path(places["scheduler"]))
    command = [each for each in DRAWN["scheduler"] if "sag_scale" not in each]
    refused = in_process(
        "sample", *command, "sag_scale=0", "pag_scale=0.5", f"out={places['scheduler']}"
    )
    assert refused.code == 1
    assert "guidance.pag.term: there not set, now pag" in refused.err
    assert state(Path(places["scheduler"])) == before


# --- train.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRAINED)
def test_a_training_run_goes_on(in_process: Command, places: dict[str, str], case: str) -> None:
    folder = Path(places[case])
    before = state(folder)
    done = in_process("train", *TRAINED[case], "max_steps=4")
    assert done.code == 0, done.err
    assert f"run: {folder.resolve()}" in done.out
    after = state(folder)
    # It was not made again.
    assert after["checkpoints/step-00000002.ckpt"] == before["checkpoints/step-00000002.ckpt"]
    last = torch.load(folder / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert after["model.safetensors"][0] != before["model.safetensors"][0]
    settings = yaml.safe_load((folder / "config.yaml").read_text())["settings"]
    assert settings["data"]["_target_"] == "digits"
    assert settings["objective"]["_target_"] == {"hill": "mse", "line": "flow"}[case]

    refused = in_process("train", *TRAINED[case], f"out={folder}", "objective=min_snr")
    assert refused.code == 1
    assert "objective._target_: there" in refused.err and "now min_snr" in refused.err


# --- evaluate.py ----------------------------------------------------------------------------------


class Measured:
    """``evaluate.py`` in this process, and how many rows the network was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        ask = ClassConditional.evaluate

        def counting(denoiser: ClassConditional, *inputs: Any) -> Any:
            self.rows += len(inputs[0])
            return ask(denoiser, *inputs)

        monkeypatch.setattr(ClassConditional, "evaluate", counting)

    def __call__(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the rows of results.json."""
        self.rows = 0
        evaluate.start([*arguments, "out=results"])
        found: list[dict[str, Any]] = json.loads(Path("results/results.json").read_text())[
            "results"
        ]
        return found


@pytest.fixture
def measure(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


def test_settings_that_were_measured_are_not_measured_again(measure: Measured) -> None:
    before = state(FINISHED)
    results = measure(*SWEPT[:-1], f"{SWEPT[-1]},2")
    after = state(FINISHED)
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.endswith(".json")]) == 4
    assert measure.rows == 20 * 2 * 2  # images, steps, and both conditions of one setting
    assert [result["axes"]["cfg_scale"] for result in results] == [1, 1.5, 2]
    for result in results[:2]:
        (identity,) = result["identities"]
        assert result["metrics"] == json.loads(before[f"{identity}.json"][0])["metrics"]
    assert {result["facts"]["sampler"] for result in results} == {"DDIM"}
    measure(*SWEPT)
    assert measure.rows == 0


def test_a_metric_that_came_later_is_measured_alone(
    measure: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if recall had not been there when the folder was made."""
    monkeypatch.setattr(records, "FIRST_METRICS", frozenset(FOUR))
    asked = []
    suite = Setup.suite

    def noting(setup: Setup, *arguments: Any) -> Any:
        asked.append(setup.metrics)
        return suite(setup, *arguments)

    monkeypatch.setattr(Setup, "suite", noting)
    before = state(FINISHED)
    (whole,) = measure(*ONE_ROW)
    assert measure.rows == 20 * 2 * 2
    assert asked == [("recall",)]
    (identity,) = whole["identities"]
    after = state(FINISHED)
    first = json.loads(before[f"{identity}.json"][0])
    kept = json.loads(after[f"{identity}.json"][0])
    assert list(first["metrics"]) == list(FOUR)
    assert {name: kept["metrics"][name] for name in FOUR} == first["metrics"]
    assert {name: kept["spread"][name] for name in FOUR} == first["spread"]
    assert list(whole["metrics"]) == [*FOUR, "recall"]
    assert 0 <= whole["metrics"]["recall"] <= 1
    assert {n: after[n] for n in before if n != f"{identity}.json"} == {
        n: before[n] for n in before if n != f"{identity}.json"
    }
    (again,) = measure(*ONE_ROW)
    assert (measure.rows, again["metrics"]) == (0, whole["metrics"])
    (four,) = measure(*FOUR_METRICS)
    assert (measure.rows, four["metrics"]) == (0, first["metrics"])
    assert len(asked) == 1


def test_settings_of_one_record_measure_each_metric_once(
    measure: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "FIRST_METRICS", frozenset({"fid"}))
    results = measure("-m", *ONE_ROW, "metrics=[fid,recall],[recall,fid],[fid],[fid,precision]")
    assert [list(result["metrics"]) for result in results] == [
        ["fid", "recall"],
        ["recall", "fid"],
        ["fid"],
        ["fid", "precision"],
    ]
    assert len({result["identities"][0] for result in results}) == 1
    assert len({result["metrics"]["fid"] for result in results}) == 1
    assert measure.rows == 2 * 20 * 2 * 2


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(NAMED["sample"])))
def test_folders_of_images_keep_their_names(places: dict[str, str], number: int) -> None:
    arguments = named(NAMED["sample"][number], places)
    config = compose("sample", arguments)
    plan = make_plan(config, config.num_images, config.out)
    assert str(plan.folder.path) == NAMES["sample"][number]


@pytest.mark.parametrize("number", range(len(NAMED["train"])))
def test_folders_of_training_runs_keep_their_names(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose("train", NAMED["train"][number])
    if "+trainer.max_time" in str(NAMED["train"][number]):
        # It no longer counts in the name of a run that begins now.
        plain = [each for each in NAMED["train"][number] if "max_time" not in each]
        now = run_folder(to_dict(config))
        assert now == run_folder(to_dict(compose("train", plain)))
        Path(NAMES["train"][number]).mkdir(parents=True)
    assert str(run_folder(to_dict(config))) == NAMES["train"][number]


@pytest.mark.parametrize("number", range(len(NAMED["evaluate"])))
def test_records_keep_their_names(places: dict[str, str], number: int) -> None:
    rows = make_rows(compose("evaluate", NAMED["evaluate"][number]), None)
    measurements = make_measurements(rows, torch.device("cpu"))
    assert [each.identity for each in measurements] == NAMES["evaluate"][number]
