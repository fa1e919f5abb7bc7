"""Objectives: what a denoiser is trained to minimise."""

from sag_dit.training.objective.base import Frozen, Losses, Objective, features_of
from sag_dit.training.objective.flow import FlowMatching
from sag_dit.training.objective.hybrid import Hybrid
from sag_dit.training.objective.min_snr import MinSNR
from sag_dit.training.objective.squared_error import MSE, mse

__all__ = [
    "MSE",
    "FlowMatching",
    "Frozen",
    "Hybrid",
    "Losses",
    "MinSNR",
    "Objective",
    "features_of",
    "mse",
]
