"""Guidance: terms that are added to a denoiser's prediction, one short file each."""

from sag_dit.guidance.cfg import CFG
from sag_dit.guidance.guided import GuidedDenoiser
from sag_dit.guidance.sag import SAG, BlurGuidance
from sag_dit.guidance.term import Branch, Question, Term

__all__ = ["CFG", "SAG", "BlurGuidance", "Branch", "GuidedDenoiser", "Question", "Term"]
