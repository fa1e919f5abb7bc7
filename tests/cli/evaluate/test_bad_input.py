"""``evaluate.py``: misuse is told on one screen, with the remedy, before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sag_dit.cli.composing import changed
from sag_dit.cli.evaluate import run_evaluate
from sag_dit.cli.keys import Evaluate as Keys

Evaluate = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected one of samples=FOLDER"),
        (["ckpt=digits", "features=incepton"], "expected one of auto, clip, digits"),
        (["ckpt=digits", "sag_scael=1"], "Did you mean sag_scale"),
        (["-m", "ckpt=digits"], "-m: no key has several values"),
        (["-m", "ckpt=digits", "trainer.devices=1,2"], "the trainer cannot differ"),
    ],
)
def test_arguments(evaluate: Evaluate, arguments: list[str], told: str) -> None:
    outcome = evaluate(*arguments)
    assert outcome.code == 1
    assert told in outcome.err
    assert "Traceback" not in outcome.err


INCEPTION = {"_target_": "sag_dit.evaluation.inception.Inception", "weights": None}
PATCHES = {"_target_": "sag_dit.evaluation.classifier.bundled_classifier", "name": "patches"}
DIGITS = {**PATCHES, "name": "digits"}
DRAWN: dict[str, Any] = {"ckpt": "digits"}
STORED: dict[str, Any] = {"samples": "few.npz", "features": DIGITS}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ckpt": "digits", "samples": "x"}, "samples=x and ckpt=digits: expected one of"),
        ({**DRAWN, "metrics": ["fid", "kid"]}, "metrics=kid: expected"),
        ({**DRAWN, "metrics": "fid"}, r"expected a list, such as metrics=\[fid\]"),
        ({**DRAWN, "metrics": []}, r"metrics=\[\]: expected some of"),
        ({**DRAWN, "reference": "no.npz"}, "reference=no.npz: no such file or folder; expected"),
        ({**DRAWN, "features": INCEPTION}, "features: Inception's weights are not here"),
        ({**DRAWN, "features": {"_target_": "builtins.dict"}}, "makes a dict"),
        ({**DRAWN, "seeds": 0}, "seeds=0: expected a whole number, 1 to 10,000"),
        ({**DRAWN, "num_images": 0}, "num_images=0: expected a whole number"),
        ({**DRAWN, "confidence": {"repeats": 1}}, "confidence.repeats=1: expected 0, or 2 or more"),
        ({**DRAWN, "compare": {"x": {"sag_scael": 1}}}, "compare.x: .*sag_scael"),
        ({**DRAWN, "compare": {"x": 3}}, "compare.x=3: expected a mapping"),
        ({**DRAWN, "compare": {"x": None}}, "compare.x=null: expected a mapping"),
        ({**DRAWN, "compare": {"x": {"out": "/x"}}}, "compare.x.out: all rows have the same"),
        (
            {**DRAWN, "compare": {"x": {"trainer.devices": 2}}},
            "compare.x.trainer.devices: all rows have the same",
        ),
        ({**DRAWN, "samples": "nowhere"}, "there is no nowhere"),
        ({**DRAWN, "expected": {"source": ""}}, "expected.source=: expected text"),
        ({**DRAWN, "expected": {"sorce": "x"}}, "expected.sorce: no such key"),
        ({"samples": "nowhere"}, "samples: 'nowhere': no such file or folder"),
        ({"samples": []}, r"samples=\[\]: expected at least one folder"),
        ({**STORED, "num_images": 3}, "num_images=3: all images of samples=few.npz"),
        ({**STORED, "seeds": 2}, "seeds=2: images on disk have theirs"),
        ({**STORED, "keep": True}, "keep=true: images on disk are kept"),
        ({**STORED, "reference": "patches:report"}, "the features `digits`"),
    ],
)
@pytest.mark.usefixtures("evaluate")
def test_values(
    defaults: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    told: str,
) -> None:
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((12, 8, 8, 1), np.uint8))
    # Nothing is downloaded: the weights are nowhere, and there is no network.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    monkeypatch.setattr("sag_dit.training.module.DiffusionModule.predict_step", _no_drawing)
    with pytest.raises(ValueError, match=told):
        run_evaluate(changed("evaluate", defaults, values))
    assert not (tmp_path / "outputs").exists()


def _no_network(*arguments: object, **options: object) -> None:
    raise OSError("no network")


def _no_drawing(*arguments: object) -> None:
    raise AssertionError("images were drawn before the misuse was told")
