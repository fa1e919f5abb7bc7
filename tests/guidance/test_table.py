"""The tables of methods and backbones in docs/guidance.md."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import sag_dit
from benchmarks import methods
from sag_dit import guidance
from sag_dit import methods as index
from sag_dit.cli.composing import config_folder
from sag_dit.guidance import CFGZero, GuidedDenoiser, Term
from sag_dit.identity import plain
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
    flows = set() if "flow" in backbone else set(methods.OF_FLOWS)
    assert missing == flows | {*methods.OF_TEXT}
    if flows:
        with pytest.raises(ValueError, match="guides flow models"):
            GuidedDenoiser(MODELS[backbone.removeprefix("DiT, ")], [CFGZero(2.0)])


def test_the_pages_are_as_the_script_writes_them() -> None:
    for file, text in methods.pages().items():
        assert file.read_text(encoding="utf-8") == text, "run python -m benchmarks.methods"


def test_the_index_says_what_the_classes_say() -> None:
    """It reads them without importing them."""
    kinds = {getattr(guidance, name) for name in guidance.__all__}
    terms = {each for each in kinds if isinstance(each, type) and issubclass(each, guidance.Term)}
    assert terms - set(methods.classes()) == {
        *(Term, guidance.BranchTerm, guidance.Perturbed, guidance.Rewriting)
    }
    for each in index.methods():
        kind = getattr(guidance, each.name)
        assert (each.key, each.module) == (kind.key, kind.__module__)
        defaults = {field.name: plain(field.default) for field in fields(kind) if field.init}
        assert each.neutral == kind.neutral
        assert {**defaults, **each.settings} == defaults
        assert defaults.keys() - each.settings.keys() <= {"scale", "worse"}
        # What --help says of each.
        assert each.title == kind.title
        assert each.settings.keys() <= {name for name, said in each.remarks.items() if said}


def test_public_names_are_the_methods() -> None:
    for each in index.methods():
        assert getattr(sag_dit, each.name) is getattr(guidance, each.name)
        assert each.name in sag_dit.__all__ and each.name in dir(sag_dit)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sag_dit.Nothing  # noqa: B018


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_every_method_has_its_keys_at_the_command_line(command: str) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(command, ["sag_scale=0"])
    assert config.guidance.keys() == {each.key for each in index.methods()}
    for name, node in config.guidance.items():
        kind = getattr(guidance, node._target_.rpartition(".")[2])
        term = instantiate(node, _convert_="all")
        assert type(term) is kind and term == kind(kind.neutral), name
        assert config[f"{name}_scale"] == kind.neutral
