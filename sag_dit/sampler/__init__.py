"""Samplers: (denoise, x_T, grid, noise) -> an iterator of steps."""

from sag_dit.process import Step
from sag_dit.sampler.base import Denoise, Sampler, SampleStep, require_ddpm, steps_of
from sag_dit.sampler.ddim import DDIM
from sag_dit.sampler.ddpm import Ancestral
from sag_dit.sampler.ode import EulerFlow, HeunFlow
from sag_dit.sampler.sde import EulerMaruyama
from sag_dit.sampler.strided import StridedDDIM
from sag_dit.sampler.usual import auto, named, own_samplers, sampler_names

__all__ = [
    "DDIM",
    "Ancestral",
    "Denoise",
    "EulerFlow",
    "EulerMaruyama",
    "HeunFlow",
    "SampleStep",
    "Sampler",
    "Step",
    "StridedDDIM",
    "auto",
    "named",
    "own_samplers",
    "require_ddpm",
    "sampler_names",
    "steps_of",
]
