"""The pipelines of diffusers that can be guided, and how each calls its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

OwnCFG = Literal["null first", "cond first", "apart"]


@dataclass(frozen=True)
class Family:
    """Pipelines that call their network alike.

    Attributes:
        pipelines: their classes; subclasses count.
        network: the pipeline's attribute that holds the network.
        own_cfg: the order of the rows under the pipeline's own classifier-free guidance; ``apart``
            is a second call for the null prompt, after that for the prompt.

    Example:
        >>> [family.name for family in FAMILIES if "FluxPipeline" in family.pipelines]
        ['FLUX']
    """

    name: str
    pipelines: tuple[str, ...]
    network: str = "transformer"
    own_cfg: OwnCFG = "null first"


FAMILIES = (
    Family(
        "Stable Diffusion 1 and 2",
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
        ),
        network="unet",
    ),
    Family(
        "Stable Diffusion XL",
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        network="unet",
    ),
    Family("PixArt", ("PixArtAlphaPipeline", "PixArtSigmaPipeline")),
    Family(
        "Stable Diffusion 3",
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
        ),
    ),
    Family(
        "FLUX",
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline"),
        own_cfg="apart",
    ),
    Family("DiT", ("DiTPipeline",), own_cfg="cond first"),
)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        ValueError: it is not known; the message lists the known pipelines.
    """
    names = [each.__name__ for each in type(pipe).__mro__]
    for family in FAMILIES:
        if any(name in names for name in family.pipelines):
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.pipelines)})" for family in FAMILIES)
    hint = ""
    if "PAG" in names[0] or "SAG" in names[0]:
        hint = "\nthis pipeline guides by itself: use the plain one of its family"
    elif names[0].startswith("Sana"):
        hint = "\nSana's attention is linear: there is no map to read or to edit"
    raise ValueError(f"{names[0]} cannot be guided; known are {known}{hint}")


def uses_cfg(family: Family, pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call of the pipeline puts null rows beside those of the prompt."""
    if family.own_cfg == "apart":
        return False
    # The property where there is one: a callback may end the guidance within a call.
    own = getattr(pipe, "do_classifier_free_guidance", None)
    return bool(arguments["guidance_scale"] > 1 if own is None else own)


def network_of(family: Family, pipe: Any) -> nn.Module:
    """Return the pipeline's network, also where ``torch.compile`` wraps it."""
    network: nn.Module = getattr(pipe, family.network)
    wrapped = getattr(network, "_orig_mod", network)
    if getattr(wrapped, "is_cache_enabled", False):
        raise ValueError(
            f"{type(wrapped).__name__} caches what its layers compute from call to call, which "
            f"guidance's further calls would spoil; call pipe.{family.network}.disable_cache()"
        )
    return network
