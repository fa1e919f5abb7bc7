"""Checkpoints: published names, every layout in use, and our own."""

from sag_dit.checkpoints.config import build, describe
from sag_dit.checkpoints.export import write_safetensors
from sag_dit.checkpoints.loading import load
from sag_dit.checkpoints.model import Model, from_denoiser

__all__ = ["Model", "build", "describe", "from_denoiser", "load", "write_safetensors"]
