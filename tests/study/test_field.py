"""A study of all methods: most valuable cells first, kept one by one, ended by a deadline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import study
from sag_dit.guidance import CFG, SAG, Term
from sag_dit.methods import methods
from sag_dit.study.contenders import UNGUIDED, beside_cfg, contenders, strengths
from sag_dit.study.field import Deadline, Family, Row, Rules, Subject, field_study, read_rows
from tests.study.models import small_model

RULES = Rules(steps=2, images=12, seeds=1, scales=2, tuning=12, effects=3, batch_size=12)
METHODS = ["CFG", "SAG", "autoguidance"]


def family(name: str = "small", trainings: int = 1) -> Family:
    def subject(seed: int) -> Subject:
        worse = small_model(seed + 50).denoiser
        return Subject(small_model(seed), {"worse": worse} if name == "small" else {})

    made = {seed: lambda _, seed=seed: subject(seed) for seed in range(trainings)}
    return Family(name, made, "digits:tune", "digits:report")


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "records").glob("*.json")}


def named(rows: list[Row]) -> set[tuple[str, str, str]]:
    return {(row.part, row.method, row.role) for row in rows}


def test_every_method_is_a_contender_at_scales_of_its_search() -> None:
    found = contenders(3)
    assert {each.kind for each in found} and len(found) == len(methods())
    assert found[0].name == "CFG"
    for each in found:
        assert len(set(each.strengths)) == len(each.strengths) > 0
    assert strengths(SAG, 3) == [0.1, 0.63, 4.0]
    assert strengths(SAG, 1) == [0.63]
    (term,) = next(each for each in found if each.name == "SAG").make(0.5)
    assert isinstance(term, SAG) and term.scale == 0.5


def test_beside_cfg_stands_what_is_not_in_its_place() -> None:
    by_name = {each.name: each for each in contenders(2)}
    both = beside_cfg(by_name["SAG"], 1.5)
    assert both is not None and both.name == "CFG + SAG"
    assert [type(each) for each in both.make(0.5)] == [CFG, SAG]
    assert beside_cfg(by_name["APG"], 1.5) is None
    assert beside_cfg(UNGUIDED, 1.5) is None


def test_a_study_measures_methods_and_the_cfg_that_matches_them(tmp_path: Path) -> None:
    told: list[str] = []
    rows = field_study([family()], tmp_path, RULES, only=METHODS, tell=told.append)
    assert not any(row.missing for row in rows)
    reported = [row for row in rows if row.part == "report"]
    # Each method alone, and beside CFG, is compared with CFG in up to three ways.
    names = {"unguided", *METHODS, "CFG + SAG", "CFG + autoguidance"}
    assert {row.method for row in reported if row.role == "method"} == names
    for row in reported:
        assert row.steps and row.passes and row.sampler == "EulerFlow" and row.images == 12
        assert row.metrics["fid"] is not None
    by_role = {(row.method, row.role): row for row in reported}
    own, along = by_role["CFG + SAG", "method"], by_role["CFG + SAG", "along"]
    assert along.steps == 2 and along.guidance.startswith("CFG")
    passes = by_role["CFG + SAG", "passes"]
    assert passes.passes == own.passes == 6 and passes.steps == 3
    assert ("CFG", "along") not in by_role
    # The scale that is reported is the better of those that were tried.
    tried = {row.strength: row for row in rows if row.part == "tune" and row.method == "SAG"}
    assert len(tried) == 2
    best = min(tried.values(), key=lambda row: row.metrics["fid"] or 0)
    assert by_role["SAG", "method"].strength == best.strength
    # The effect of CFG along CFG is its scale.
    effects = {row.method: row for row in rows if row.part == "effect"}
    scale = 1 + (effects["CFG"].strength or 0)
    assert effects["CFG"].effect["along"] == pytest.approx(scale, rel=1e-3)
    # A second call measures nothing anew and tells the same.
    before = stamps(tmp_path)
    again = field_study([family()], tmp_path, RULES, only=METHODS, tell=told.append)
    assert again == rows and stamps(tmp_path) == before


def test_a_deadline_ends_it_and_the_next_call_goes_on(tmp_path: Path) -> None:
    told: list[str] = []

    class Steps(Deadline):
        """Has time for so many looks at the clock."""

        def __init__(self, looks: int) -> None:
            self.looks = looks

        @property
        def left(self) -> float:
            self.looks -= 1
            return float(self.looks > 0)

    rows = field_study([family()], tmp_path, RULES, Steps(4), only=METHODS, tell=told.append)
    assert told[-1].startswith("no time is left")
    assert 0 < len(rows) < 8
    kept = stamps(tmp_path)
    whole = field_study([family()], tmp_path, RULES, only=METHODS)
    assert all(row in whole for row in rows)
    assert kept.items() <= stamps(tmp_path).items()


def test_what_a_killed_study_was_writing_is_done_again(tmp_path: Path) -> None:
    rows = field_study([family()], tmp_path, RULES, only=["CFG"])
    for file in (*(tmp_path / "rows").glob("*.json"), *(tmp_path / "records").glob("*.json")):
        file.unlink()
    again = field_study([family()], tmp_path, RULES, only=["CFG"])
    timeless = [[replace(row, seconds=0.0) for row in each] for each in (rows, again)]
    assert timeless[0] == timeless[1]


def test_what_cannot_be_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No worse model is given, and a method breaks.
    def broken(self: Term, ask: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(SAG, "contribution", broken)
    rows = field_study([family("plain")], tmp_path, RULES, only=METHODS)
    missing = {row.method: row.missing for row in rows if row.missing}
    assert "needs a worse model" in missing["autoguidance"]
    assert "RuntimeError: shapes do not fit" in missing["SAG"]
    assert ("report", "CFG", "method") in named(rows)
    # Put right, it is measured.
    monkeypatch.undo()
    rows = field_study([family("plain")], tmp_path, RULES, only=METHODS)
    assert {row.method for row in rows if row.missing} == {"autoguidance", "CFG + autoguidance"}


@pytest.mark.slow
def test_the_command_trains_measures_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        chosen = ["CFG", "autoguidance", "classifier guidance"]
        words = ["study", "--tiny", "--out", str(tmp_path), "--methods", *chosen]
        monkeypatch.setattr("sys.argv", words)
        study.main()

    run()
    rows = read_rows(tmp_path)
    assert not any(row.missing for row in rows)
    assert {"autoguidance", "classifier guidance", "CFG"} <= {row.method for row in rows}
    trained = tmp_path / "models" / "digits-flow-0" / "model.safetensors"
    early = tmp_path / "models" / "digits-flow-0-early" / "model.safetensors"
    assert trained.read_bytes() != early.read_bytes()
    # Again: nothing is trained or measured, and every number is as it was.
    before = trained.stat().st_mtime_ns, stamps(tmp_path)
    run()
    assert (trained.stat().st_mtime_ns, stamps(tmp_path)) == before
    assert read_rows(tmp_path) == rows


@pytest.mark.parametrize("text", ["60", "10000passes", "soon"])
def test_a_budget_is_a_time(text: str) -> None:
    assert study.seconds_of("1.5h") == 5400
    with pytest.raises(ValueError, match="expected a time, such as 60min"):
        study.seconds_of(text)


def test_one_folder_holds_the_study_of_one_protocol(tmp_path: Path) -> None:
    field_study([family()], tmp_path, RULES, Deadline(0.0), only=["CFG"])
    with pytest.raises(ValueError, match="holds a study with images=12"):
        field_study([family()], tmp_path, replace(RULES, images=24), only=["CFG"])
    with pytest.raises(ValueError, match="only=SAGA: expected titles of methods"):
        field_study([family()], tmp_path, RULES, only=["SAGA"])
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "x.json").write_text(json.dumps({"family": 1}), "utf-8")
    with pytest.raises(ValueError, match=r"x\.json"):
        read_rows(tmp_path)
