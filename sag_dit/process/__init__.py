"""Forward processes: how an image becomes noise, and what a network's output says of it."""

from sag_dit.process.base import NoiseLevel, Prediction, Process, Step
from sag_dit.process.ddpm import DDPM
from sag_dit.process.flow import Flow

__all__ = ["DDPM", "Flow", "NoiseLevel", "Prediction", "Process", "Step"]
