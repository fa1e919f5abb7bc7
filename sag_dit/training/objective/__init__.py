"""Objectives: what a denoiser is trained to minimise."""

from sag_dit.training.objective.base import Losses, Objective
from sag_dit.training.objective.flow import FlowMatching
from sag_dit.training.objective.hybrid import Hybrid
from sag_dit.training.objective.min_snr import MinSNR
from sag_dit.training.objective.squared_error import MSE, mse

__all__ = ["MSE", "FlowMatching", "Hybrid", "Losses", "MinSNR", "Objective", "mse"]
