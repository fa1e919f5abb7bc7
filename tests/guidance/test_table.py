"""The tables of methods and backbones in docs/guidance.md."""

from __future__ import annotations

import pytest

from benchmarks import methods
from sag_dit import guidance
from sag_dit.guidance import CFGZero, GuidedDenoiser
from tests.guidance import test_unet_methods as unet
from tests.guidance.every import CELLS, MODELS
from tests.pipelines import test_every_method as pipelines

PIPELINES = {
    "SD 1, 2": "sd",
    "SDXL": "sdxl",
    "PixArt": "pixart",
    "SD3": "sd3",
    "FLUX": "flux",
    "DiT": "dit",
}
VARIANTS = {
    "CFG, rescale": "CFG, rescaled",
    "blur": "blur guidance",
    "classifier": "classifier guidance",
    **{f"SAG, {mask}": "SAG's other masks" for mask in ("high frequency", "random", "square")},
}
"""What tests of every method call a row of the table, where it is called otherwise."""


def rows(names: set[str]) -> set[str]:
    """The rows of the table that these settings of methods prove."""
    return {VARIANTS.get(name, name) for name in names} & methods.METHODS.keys()


def test_each_cell_names_a_test_that_exists() -> None:
    assert methods.missing() == []
    for backbone, proofs in {**methods.NETWORKS, **methods.PIPELINES}.items():
        assert proofs.keys() <= methods.METHODS.keys(), backbone


def test_a_tick_of_a_network_is_what_the_tests_of_every_method_run() -> None:
    for backbone, proofs in methods.NETWORKS.items():
        kind = backbone.removeprefix("DiT, ")
        tested = {name for model, name in CELLS if model == kind}
        if backbone == "UNet, eps":
            tested = set(unet.TERMS)
            assert methods.METHODS.keys() - proofs.keys() == unet.REFUSED.keys()
        assert rows(tested) == proofs.keys(), backbone


def test_a_cell_of_a_pipeline_is_what_the_tests_of_every_method_run() -> None:
    assert methods.PIPELINES.keys() == PIPELINES.keys()
    assert pipelines.METHODS.keys() == methods.METHODS.keys()
    for backbone, proofs in methods.PIPELINES.items():
        family = PIPELINES[backbone]
        assert {name for each, name in pipelines.CELLS if each == family} == proofs.keys()


@pytest.mark.parametrize("backbone", [name for name in methods.NETWORKS if name[:3] == "DiT"])
def test_a_dash_of_a_dit_is_a_refusal(backbone: str) -> None:
    missing = methods.METHODS.keys() - methods.NETWORKS[backbone].keys()
    assert missing == (set() if "flow" in backbone else {"CFG-Zero*"})
    if missing:
        with pytest.raises(ValueError, match="guides flow models"):
            GuidedDenoiser(MODELS[backbone.removeprefix("DiT, ")], [CFGZero(2.0)])


def test_the_pages_are_as_the_script_writes_them() -> None:
    for file, text in methods.pages().items():
        assert file.read_text(encoding="utf-8") == text, "run python -m benchmarks.methods"


def test_every_method_has_a_row() -> None:
    named = {name.strip("`").partition("(")[0] for name in methods.METHODS.values()}
    terms = {
        name
        for name in guidance.__all__
        if isinstance(getattr(guidance, name), type)
        and issubclass(getattr(guidance, name), guidance.Term)
    }
    assert terms - named == {"Term", "BranchTerm", "Perturbed"}
