"""Checkpoints: published names, every layout in use, and our own."""

from sag_dit.checkpoints.config import build, describe
from sag_dit.checkpoints.edm2 import EDM2Autoencoder
from sag_dit.checkpoints.export import write_safetensors
from sag_dit.checkpoints.loading import load, load_classifier, load_denoiser
from sag_dit.checkpoints.model import Model, from_denoiser
from sag_dit.checkpoints.text import is_text, load_text

__all__ = [
    "EDM2Autoencoder",
    "Model",
    "build",
    "describe",
    "from_denoiser",
    "is_text",
    "load",
    "load_classifier",
    "load_denoiser",
    "load_text",
    "write_safetensors",
]
