"""Samplers: (denoise, x_T, grid, noise) -> an iterator of steps."""

from sag_dit.sampler.base import Denoise, Sampler, SampleStep
from sag_dit.sampler.ddim import DDIM
from sag_dit.sampler.ddpm import Ancestral

__all__ = ["DDIM", "Ancestral", "Denoise", "SampleStep", "Sampler"]
