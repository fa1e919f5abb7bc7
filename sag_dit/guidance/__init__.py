"""Guidance: terms that are added to a denoiser's prediction, one short file each."""

from importlib import import_module
from typing import TYPE_CHECKING

from sag_dit.guidance.caching import Cache as Cache
from sag_dit.guidance.cost import Cost as Cost
from sag_dit.guidance.cost import cost_of as cost_of
from sag_dit.guidance.guided import GuidedDenoiser as GuidedDenoiser
from sag_dit.guidance.perturbed import Perturbed as Perturbed
from sag_dit.guidance.term import Asking as Asking
from sag_dit.guidance.term import Branch as Branch
from sag_dit.guidance.term import BranchTerm as BranchTerm
from sag_dit.guidance.term import Contribution as Contribution
from sag_dit.guidance.term import Question as Question
from sag_dit.guidance.term import Rewriting as Rewriting
from sag_dit.guidance.term import Term as Term
from sag_dit.methods import methods

if TYPE_CHECKING:
    from sag_dit.guidance.typed import *  # noqa: F403 - each method's class, for type checkers
else:
    for method in methods():
        globals()[method.name] = getattr(import_module(method.module), method.name)
    del method

__all__ = [
    *("Asking", "Branch", "BranchTerm", "Cache", "Contribution", "Cost", "GuidedDenoiser"),
    *("Perturbed", "Question", "Rewriting", "Term", "cost_of"),
    *(each.name for each in methods()),
]
