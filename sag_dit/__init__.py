"""sag_dit: train diffusion transformers and sample from them with Self-Attention Guidance.

Public names load on first use, so that ``import sag_dit`` itself costs nothing:

    model = sag_dit.load("digits")
    out = model.sample([3, 7], guidance=sag_dit.SAG(1.0), steps=50)
    out.images[0].save("three.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sag_dit import study as study
    from sag_dit.api import LoadedModel as LoadedModel
    from sag_dit.api import Samples as Samples
    from sag_dit.api import load as load
    from sag_dit.api import load_text as load_text
    from sag_dit.checkpoints import Model as Model
    from sag_dit.guidance import Cache as Cache
    from sag_dit.guidance.typed import *  # noqa: F403
    from sag_dit.pipelines import guide as guide
    from sag_dit.pipelines.guider import as_guider as as_guider
    from sag_dit.sampling import sample as sample
    from sag_dit.search import BestOf as BestOf
    from sag_dit.search import FKSteering as FKSteering

_HOME = {
    "BestOf": "sag_dit.search",
    "FKSteering": "sag_dit.search",
    "Cache": "sag_dit.guidance",
    "LoadedModel": "sag_dit.api",
    "Model": "sag_dit.checkpoints",
    "Samples": "sag_dit.api",
    "as_guider": "sag_dit.pipelines.guider",
    "guide": "sag_dit.pipelines",
    "load": "sag_dit.api",
    "load_text": "sag_dit.api",
    "sample": "sag_dit.sampling",
    "study": "sag_dit.study",
}

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Return the module of each public name: the guidance methods and what stands above."""
    from sag_dit.methods import methods

    return {**{method.name: "sag_dit.guidance" for method in methods()}, **_HOME}


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted(_homes())
    home = _HOME.get(name)
    if home is None and name.startswith("_"):
        raise AttributeError(f"module 'sag_dit' has no attribute {name!r}")
    home = home or _homes().get(name)
    if home is None:
        raise AttributeError(f"module 'sag_dit' has no attribute {name!r}")
    found = import_module(home)
    return found if home == f"sag_dit.{name}" else getattr(found, name)


def __dir__() -> list[str]:
    return [*sorted(_homes()), "__version__"]
