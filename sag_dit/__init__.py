"""sag_dit: train diffusion transformers and sample from them with Self-Attention Guidance.

Public names load on first use, so that ``import sag_dit`` itself costs nothing:

    model = sag_dit.load("digits")
    images = sag_dit.sample(model, classes=[3, 7], guidance=[sag_dit.SAG(scale=1.0)], steps=50)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model, load, load_text
    from sag_dit.guidance import (
        APG,
        CFG,
        ICG,
        PAG,
        SAG,
        SEG,
        SLG,
        TPG,
        TSG,
        Autoguidance,
        BlurGuidance,
        CFGZero,
        ClassifierGuidance,
    )
    from sag_dit.pipelines import guide
    from sag_dit.sampling import sample

_HOME = {
    "APG": "sag_dit.guidance",
    "CFG": "sag_dit.guidance",
    "ICG": "sag_dit.guidance",
    "PAG": "sag_dit.guidance",
    "SAG": "sag_dit.guidance",
    "SEG": "sag_dit.guidance",
    "SLG": "sag_dit.guidance",
    "TPG": "sag_dit.guidance",
    "TSG": "sag_dit.guidance",
    "Autoguidance": "sag_dit.guidance",
    "BlurGuidance": "sag_dit.guidance",
    "CFGZero": "sag_dit.guidance",
    "ClassifierGuidance": "sag_dit.guidance",
    "Model": "sag_dit.checkpoints",
    "guide": "sag_dit.pipelines",
    "load": "sag_dit.checkpoints",
    "load_text": "sag_dit.checkpoints",
    "sample": "sag_dit.sampling",
}

__version__ = "0.1.0"
__all__ = [
    "APG",
    "CFG",
    "ICG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TPG",
    "TSG",
    "Autoguidance",
    "BlurGuidance",
    "CFGZero",
    "ClassifierGuidance",
    "Model",
    "guide",
    "load",
    "load_text",
    "sample",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sag_dit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
