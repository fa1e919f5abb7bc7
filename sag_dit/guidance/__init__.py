"""Guidance: terms that are added to a denoiser's prediction, one short file each."""

from sag_dit.guidance.apg import APG
from sag_dit.guidance.auto import Autoguidance
from sag_dit.guidance.cfg import CFG
from sag_dit.guidance.cfg_zero import CFGZero
from sag_dit.guidance.classifier import ClassifierGuidance
from sag_dit.guidance.cost import Cost, cost_of
from sag_dit.guidance.guided import GuidedDenoiser
from sag_dit.guidance.icg import ICG
from sag_dit.guidance.pag import PAG
from sag_dit.guidance.perturbed import Perturbed
from sag_dit.guidance.sag import SAG, BlurGuidance
from sag_dit.guidance.seg import SEG
from sag_dit.guidance.slg import SLG
from sag_dit.guidance.term import Asking, Branch, BranchTerm, Question, Term
from sag_dit.guidance.tpg import TPG
from sag_dit.guidance.tsg import TSG

__all__ = [
    "APG",
    "CFG",
    "ICG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TPG",
    "TSG",
    "Asking",
    "Autoguidance",
    "BlurGuidance",
    "Branch",
    "BranchTerm",
    "CFGZero",
    "ClassifierGuidance",
    "Cost",
    "GuidedDenoiser",
    "Perturbed",
    "Question",
    "Term",
    "cost_of",
]
