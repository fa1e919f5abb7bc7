"""Denoisers: networks that answer (x_t, level, condition) with a Prediction."""

from sag_dit.denoiser.base import Denoiser
from sag_dit.denoiser.class_conditional import ClassConditional

__all__ = ["ClassConditional", "Denoiser"]
