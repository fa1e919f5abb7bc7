"""What a run differs in from the experiment that states the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hydra.errors import MissingConfigException

from sag_dit.cli.composing import compose
from sag_dit.cli.keys import Evaluate
from sag_dit.cli.published import expected_of, otherwise
from sag_dit.evaluation.expected import Expected

FACTS = {
    "count": 50000, "model": "ADM-256-uncond", "sampler": "Ancestral", "steps": 250,
    "guidance": "SAG 0.8", "features": "inception", "reference": "VIRTUAL_imagenet256_labeled.npz",
}  # fmt: skip
COUNT = "count: not published, here 50,000"


def deviations(config: Evaluate, expected: Expected, facts: Mapping[str, Any]) -> list[str]:
    """What stands beside published numbers: of the protocol, then of the settings."""
    return [*expected.deviations(facts), *otherwise(config, expected)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([], []),
        (["seed=3", "batch_size=4", "num_images=50000", "out=elsewhere"], []),
        (["guidance.cfg.channels=3"], []),  # of a term that is off
        (["guidance.sag.heads=null"], ["guidance.sag.heads: 4 in the experiment, here none"]),
        (
            ["guidance.sag.mask=global", "guidance.sag.blur_sigma=3"],
            [
                "guidance.sag.blur_sigma: 9.0 in the experiment, here 3",
                "guidance.sag.mask: attention in the experiment, here global",
            ],
        ),
        (
            ["guidance.sag.schedule=linear"],
            ["guidance.sag.schedule: constant in the experiment, here linear"],
        ),
        (
            ["trainer.precision=16-mixed", "classes=[1]"],
            [
                "classes: none in the experiment, here [1]",
                "trainer.precision: 32-true in the experiment, here 16-mixed",
            ],
        ),
    ],
)
def test_settings_that_are_not_the_experiment_s(changed: list[str], told: list[str]) -> None:
    config = compose("evaluate", ["experiment=paper/adm256_uncond_sag0.8", *changed])
    expected = expected_of(config)
    assert expected is not None
    assert deviations(config, expected, FACTS) == [COUNT, *told]


def test_what_the_protocol_says_in_a_word_is_told_once() -> None:
    changed = ["sampler=ddim", "steps=20", "sag_scale=0.5", "cfg_scale=1.5"]
    config = compose("evaluate", ["experiment=paper/adm256_uncond_sag0.8", *changed])
    expected = expected_of(config)
    assert expected is not None
    facts = {**FACTS, "sampler": "DDIM", "steps": 20, "guidance": "CFG 1.5 + SAG 0.5"}
    assert deviations(config, expected, facts) == [
        COUNT,
        "sampler: published Ancestral, here DDIM",
        "steps: published 250, here 20",
        "guidance: published SAG 0.8, here CFG 1.5 + SAG 0.5",
    ]


def test_the_form_of_classifier_guidance_is_a_setting() -> None:
    form = "guidance.classifier.form=score"
    config = compose("evaluate", ["experiment=paper/adm128_cg", form])
    expected = expected_of(config)
    assert expected is not None
    told = deviations(config, expected, {key: expected.protocol[key] for key in expected.protocol})
    assert told[1:] == ["guidance.classifier.form: mean in the experiment, here score"]


def test_an_experiment_that_is_not_there() -> None:
    config = compose("evaluate", ["experiment=paper/adm128", "expected.experiment=paper/adm12"])
    expected = expected_of(config)
    assert expected is not None
    with pytest.raises(MissingConfigException, match="paper/adm12"):
        deviations(config, expected, FACTS)
