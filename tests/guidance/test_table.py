"""The table of methods and backbones in docs/guidance.md."""

from __future__ import annotations

from benchmarks import methods
from sag_dit import guidance


def test_each_cell_names_a_test_that_exists() -> None:
    assert methods.missing() == []
    for backbone, proofs in methods.PROOFS.items():
        assert proofs.keys() <= methods.METHODS.keys(), backbone


def test_the_page_is_as_the_script_writes_it() -> None:
    text = methods.PAGE.read_text(encoding="utf-8")
    assert methods.page(text) == text, "run python -m benchmarks.methods"


def test_every_method_has_a_row() -> None:
    named = {name.strip("`").partition("(")[0] for name in methods.METHODS.values()}
    terms = {
        name
        for name in guidance.__all__
        if isinstance(getattr(guidance, name), type)
        and issubclass(getattr(guidance, name), guidance.Term)
    }
    assert terms - named == {"Term", "BranchTerm", "Perturbed"}
