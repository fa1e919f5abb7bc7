"""Published numbers: read from configurations, compared, and what differs of the protocol."""

from __future__ import annotations

from typing import Any

import pytest

from sag_dit import catalogue
from sag_dit.cli.composing import compose, config_folder
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.published import expected_of as read
from sag_dit.cli.values import make_terms
from sag_dit.evaluation.expected import Expected, differing
from sag_dit.guidance import CFG, SAG, ClassifierGuidance
from sag_dit.sampler import Ancestral

PAPERS = sorted(file.stem for file in (config_folder() / "experiment" / "paper").glob("dit*.yaml"))
PUBLISHED = {
    "dit256": (9.62, 6.85, 121.50, 0.67, 0.67),
    "dit256_cfg1.25": (3.22, 5.28, 201.77, 0.76, 0.62),
    "dit256_cfg1.5": (2.27, 4.60, 278.24, 0.83, 0.57),
    "dit512": (12.03, 7.12, 105.25, 0.75, 0.64),
    "dit512_cfg1.25": (4.64, 5.77, 174.77, 0.81, 0.57),
    "dit512_cfg1.5": (3.04, 5.02, 240.82, 0.84, 0.54),
}
"""Peebles and Xie 2023, tables 2 and 3: FID, sFID, IS, precision, recall."""


def test_differences_are_of_what_both_have() -> None:
    expected = Expected("a table", {"fid": 2.0, "is": 250.0}, {})
    found = expected.differences({"fid": 2.5, "recall": 0.6, "is": 240.0})
    assert found == {"fid": (2.0, 2.5, 0.5), "is": (250.0, 240.0, -10.0)}


def test_deviations_name_both_sides() -> None:
    protocol = {"count": 50000, "steps": 250, "vae": "ema", "terms": {"a": 1.5}, "guidance": "none"}
    expected = Expected("a table", {"fid": 2.0}, protocol)
    ours: dict[str, Any] = {"count": 1000, "steps": 250.0, "vae": None, "terms": {"a": 1.5}}
    assert expected.deviations(ours) == [
        "count: published 50,000, here 1,000",
        "vae: published ema, here not known",
        "guidance: published none, here not known",
    ]
    assert expected.deviations(protocol) == []


def test_what_was_not_published_never_agrees() -> None:
    expected = Expected("a table", {"fid": 2.0}, {"count": None})
    assert expected.deviations({"count": 50000}) == ["count: not published, here 50,000"]
    assert expected.deviations({}) == ["count: not published, here none"]


def test_settings_that_differ() -> None:
    stated = {"precision": "32-true", "heads": 4, "interval": [0.0, 1.0], "eta": 1}
    assert differing(stated, {**stated, "eta": 1.0}) == []
    ours = {"heads": None, "interval": [0.0, 0.5], "eta": 1, "more": True}
    assert differing(stated, ours) == [
        "precision: 32-true in the experiment, here none",
        "heads: 4 in the experiment, here none",
        "interval: [0.0, 1.0] in the experiment, here [0.0, 0.5]",
        "more: none in the experiment, here true",
    ]


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"metrics": {"fid": 2}}, "expected.source is empty"),
        ({"source": "x"}, "expected.metrics is empty"),
        ({"source": "x", "metrics": {"kid": 1}}, "expected.metrics.kid: no such metric"),
        ({"source": "x", "metrics": {"fid": "2.27"}}, "expected.metrics.fid='2.27'"),
        ({"source": "x", "metrics": {"fid": 2}, "steps": 3}, "expected.steps: expected source"),
    ],
)
def test_bad_entries(node: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Expected.of(node)


def test_every_row_of_the_paper_is_there() -> None:
    assert set(PAPERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PAPERS)
def test_both_commands_take_the_published_settings(name: str) -> None:
    both = [compose(command, [f"experiment=paper/{name}"]) for command in ("sample", "evaluate")]
    for config in both:
        assert isinstance(instantiated(config.sampler), Ancestral)
        active = [term for term in make_terms(config.guidance).values() if not term.off]
        scale = float(name.partition("_cfg")[2] or 1)
        guided = [CFG(scale, channels=3)] if scale != 1 else []
        assert active == guided
        size = name[3:6]
        assert config.ckpt == {"256": "DiT-XL-2", "512": "DiT-XL-2-512"}[size]
        assert (config.num_images, config.steps, config.classes) == (50_000, 250, "random")
        assert config.vae == "ema"
    expected = expected_of(both[1])
    assert tuple(PUBLISHED[name]) == tuple(expected.metrics.values())
    protocol = expected.protocol
    assert (protocol["count"], protocol["steps"]) == (both[1].num_images, both[1].steps)
    assert size in protocol["reference"]
    assert ("CFG" in protocol["guidance"]) == (scale != 1)


SAG_ROWS = {
    "adm256_uncond": (26.21, 6.35, 39.70, 0.61, 0.63),
    "adm256_uncond_sag0.5": (20.31, 5.09, 45.30, 0.66, 0.61),
    "adm256_uncond_sag0.8": (20.08, 5.77, 45.56, 0.68, 0.59),
    "adm256": (10.94, 6.02, 100.98, 0.69, 0.63),
    "adm256_sag0.2": (9.41, 5.28, 104.79, 0.70, 0.62),
    "lsun_cat": (7.03, 8.24, 0.60, 0.53),
    "lsun_cat_sag0.05": (6.87, 8.21, 0.60, 0.50),
    "lsun_horse": (3.45, 7.55, 0.68, 0.56),
    "lsun_horse_sag0.01": (3.43, 7.51, 0.68, 0.55),
    "adm128": (5.91, 5.09, 0.70, 0.65),
    "adm128_cg": (2.97, 5.09, 0.78, 0.59),
    "adm128_sag0.1": (5.11, 4.09, 0.72, 0.65),
    "adm128_cg_sag0.1": (2.58, 4.35, 0.79, 0.59),
}
"""Hong et al. 2023: FID, sFID, IS, precision and recall, as far as they were given."""


def test_every_row_of_the_sag_paper_is_there() -> None:
    folder = config_folder() / "experiment" / "paper"
    others = {*PUBLISHED, "adm256_upsampled", "adm128_ddim25_cg_sag0.1"}
    assert {file.stem for file in folder.glob("*.yaml")} - others == set(SAG_ROWS)


@pytest.mark.parametrize("name", SAG_ROWS)
def test_rows_of_the_sag_paper_set_what_it_says(name: str) -> None:
    config = compose("evaluate", [f"experiment=paper/{name}"])
    assert compose("sample", [f"experiment=paper/{name}"]).guidance == config.guidance
    expected = expected_of(config)
    assert expected.protocol["count"] is None
    assert config.ckpt in catalogue.entries("model")
    assert isinstance(instantiated(config.sampler), Ancestral)
    active = {type(term): term for term in make_terms(config.guidance).values() if not term.off}
    scale = float(name.partition("_sag")[2] or 0)
    assert (SAG in active) == (scale > 0)
    assert (ClassifierGuidance in active) == ("_cg" in name)
    if scale:
        sag = active[SAG]
        assert isinstance(sag, SAG)
        at_128 = name.startswith("adm128")
        assert sag.scale == scale
        assert sag.layer == ("output_blocks.8" if at_128 else "output_blocks.2")
        assert (sag.blur_sigma, sag.kernel_size) == (3.0 if at_128 else 9.0, 31)
    if "_cg" in name:
        guidance = active[ClassifierGuidance]
        assert isinstance(guidance, ClassifierGuidance)
        assert (guidance.scale, guidance.form) == (0.5, "mean")
        assert guidance.classifier in catalogue.entries("classifier")
    assert tuple(expected.metrics.values()) == SAG_ROWS[name]


def instantiated(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node)


def expected_of(config: Any) -> Expected:
    expected = read(config)
    assert expected is not None
    # The file is the one that states the published settings, and its reference the published one.
    assert config == compose("evaluate", [f"experiment={expected.experiment}"])
    assert config.reference == expected.protocol["reference"]
    return expected


def test_evaluate_has_the_keys_of_sample() -> None:
    """So that whatever determines pixels there can be set here."""
    sample, evaluate = (to_dict(compose(command)) for command in ("sample", "evaluate"))
    assert set(sample) - {"npz", "maps", "attention", "verify", "grid"} <= set(evaluate)
    scales = {key for key in sample if key.endswith("_scale")} - {"sag_scale"}
    assert scales
    assert {key: sample[key] for key in scales} == {key: evaluate[key] for key in scales}
