"""Metrics beside the usual ones: named, configured, kept, and refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Evaluate = Callable[..., Any]

FILE = """
import torch

class Bright:
    label = "brightness"
    def __init__(self, factor=1.0):
        self.factor = factor
    def __call__(self, images, condition):
        return self.factor * images.mean((1, 2, 3))

def label(images, condition, plus=0.0):
    return condition + plus
"""
NAMED = "metrics=[vendi,kd,mmd,density,coverage,fdr,fid]"
FDR = "fdr.features=[digits]"
JUDGES = (
    "verifiers.bright._target_=my_judges.Bright",
    "+verifiers.bright.factor=2.0",
    "verifiers.asked._target_=my_judges.label",
)


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)


def test_all_of_them_at_once(draw: Evaluate, judges: None) -> None:
    few = ("compare=none", "num_images=40", "confidence.repeats=4")
    outcome = draw(*few, NAMED, FDR, *JUDGES)
    assert outcome.code == 0, outcome.err
    (result,) = outcome.results
    names = [*NAMED[9:-1].split(","), "bright", "asked"]
    assert list(result["metrics"]) == list(result["spread"]) == names
    found = result["metrics"]
    assert 1 <= found["vendi"] <= 32 and found["mmd"] >= 0 and 0 <= found["coverage"] <= 1
    assert found["asked"] == 4.5  # classes 0 to 9 in turn
    assert 0 < found["bright"] < 2
    facts = result["facts"]
    assert facts["fdr"][0]["split"] == "digits:tune"
    assert found["fdr"] == pytest.approx(found["fid"] / facts["fdr"][0]["fd"])
    assert facts["verifiers"]["bright"]["factor"] == 2
    for label in ("Vendi ↑", "KD ↓", "MMD ↓", "density ↑", "coverage ↑", "FDr ↓", "brightness ↑"):
        assert label in outcome.out
    # The same again is not measured again, and a verifier with another setting is.
    kept = list(Path("outputs/evaluate/finished").glob("*.json"))
    assert draw(*few, NAMED, FDR, *JUDGES).results == outcome.results
    assert list(Path("outputs/evaluate/finished").glob("*.json")) == kept
    other = draw(*few, NAMED, FDR, *JUDGES, "verifiers.bright.factor=4.0").results
    assert other[0]["metrics"]["bright"] == pytest.approx(2 * found["bright"])


def test_images_on_disk(evaluate: Evaluate, judges: None) -> None:
    """Digits that no model has seen: the real split of FDr, and as far from the rest as real is."""
    outcome = evaluate(
        "samples=digits:tune", "features=digits", "reference=digits:report", FDR,
        "metrics=[fdr,density,coverage,vendi]", "trainer.accelerator=cpu", *JUDGES[2:],
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = outcome.results[0]["metrics"]
    assert found["fdr"] == pytest.approx(1)
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] > 0.9
    assert 4 < found["asked"] < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics=[fdr]"], "metrics=fdr needs fdr.features=[NAME,NAME]"),
        (["metrics=[fdr]", "fdr.features=[clippy]"], "fdr: features=clippy: expected one of"),
        (["metrics=[fdr]", FDR, "fdr.split=nowhere"], "fdr: reference=nowhere: "),
        (["fdr.features=digits"], "fdr.features=digits: expected a list of feature networks"),
        (["metrics=[kid]"], "metrics=kid: expected fid, sfid, is, precision, recall, density"),
        (["verifiers.fid._target_=my_judges.label"], "verifiers.fid: expected a name that no"),
        (["verifiers.a._target_=my_judges.none"], "verifiers.a._target_=my_judges.none: "),
        (["verifiers.a._target_=builtins.dict"], "verifiers.a: dict cannot be called"),
        (["features=clip", "+features.weights=nowhere"], "named by weights=FOLDER"),
    ],
)
def test_what_is_lacking_is_said(
    draw: Evaluate, judges: None, arguments: list[str], message: str
) -> None:
    outcome = draw("compare=none", *arguments)
    assert outcome.code == 1
    assert message in outcome.err and "Traceback" not in outcome.err
