"""Every class that an identity tells, and the same classes somewhere else."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from sag_dit.checkpoints.config import PROCESSES
from sag_dit.cli.encode import Encoding
from sag_dit.data.digits import Digits
from sag_dit.data.emoji import EmojiData
from sag_dit.data.images import ImageFolderData
from sag_dit.data.latents import LatentData
from sag_dit.data.patches import Patches
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import Term
from sag_dit.models import DiT
from sag_dit.models.unet.classifier import Classifier
from sag_dit.models.unet.network import UNet
from sag_dit.sampler import Sampler
from sag_dit.sampler.diffusers import DiffusersSampler
from sag_dit.sampling import Pixels
from sag_dit.study.measurement import Confidence, Protocol
from sag_dit.training.objective import Objective
from sag_dit.training.optimizers import Muon


def subclasses(base: type) -> Iterator[type]:
    """Every public class of the package below one."""
    for each in base.__subclasses__():
        if each.__module__.startswith("sag_dit.") and not each.__name__.startswith("_"):
            yield each
        yield from subclasses(each)


FAMILIES: dict[str, list[type]] = {
    "guidance": list(subclasses(Term)),
    "sampler": list(subclasses(Sampler)),
    "objective": list(subclasses(Objective)),
    "optimizer": [Muon],
    "process": list(PROCESSES.values()),
    "denoiser": [ClassConditional],
    "network": [DiT, UNet, Classifier],
    "data": [Digits, EmojiData, ImageFolderData, LatentData, Patches],
    "command": [Pixels, Protocol, Confidence, Encoding],
}


@contextmanager
def moved(*kinds: type) -> Iterator[None]:
    """Classes as if they lay in another module, under another name."""
    places = [(kind, kind.__module__, kind.__name__, kind.__qualname__) for kind in kinds]
    for kind in kinds:
        kind.__module__ = "sag_dit.elsewhere"
        kind.__name__ = kind.__qualname__ = "Renamed"
    try:
        yield
    finally:
        for kind, module, name, qualname in places:
            kind.__module__, kind.__name__, kind.__qualname__ = module, name, qualname


MOVABLE = [
    each
    for family in ("guidance", "sampler", "objective", "denoiser", "network", "data")
    for each in FAMILIES[family]
    if not inspect.isabstract(each) and each is not DiffusersSampler
]
