"""Prompts as each network is given them: the pipeline's own encoders, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sag_dit.denoiser.text_conditional import Inputs


@dataclass(frozen=True)
class Wording:
    """What a text model is asked beside the prompt.

    Attributes:
        size: the image's (height, width).
        cells: the latent's (height, width).
        negative: the prompt of the null condition; if empty, the pipeline's own is used.
        max_length: the most text tokens of a T5.
        guidance: the scale that a model distilled from guidance is told, None for others.
        tells_size: whether the network is told the image's size (PixArt-alpha at 1024 pixels).

    Example:
        >>> Wording(size=(1024, 1024), cells=(128, 128), negative="blurry").max_length
        256
    """

    size: tuple[int, int]
    cells: tuple[int, int]
    negative: str = ""
    max_length: int = 256
    guidance: float | None = None
    tells_size: bool = False


Encode = Callable[[Any, str | None, Wording, torch.device], Inputs]
"""(pipeline, prompt, wording, device) -> one row; without prompt, that of the null condition."""


def _sd(pipe: Any, prompt: str | None, wording: Wording, device: torch.device) -> Inputs:
    given, null = pipe.encode_prompt(
        prompt or "", device, 1, prompt is None, wording.negative or None
    )
    return _one_row({"encoder_hidden_states": given if prompt is not None else null})


def _sdxl(pipe: Any, prompt: str | None, wording: Wording, device: torch.device) -> Inputs:
    given, null, pooled, null_pooled = pipe.encode_prompt(
        prompt=prompt or "",
        device=device,
        do_classifier_free_guidance=prompt is None,
        negative_prompt=wording.negative or None,
    )
    height, width = wording.size
    # As drawn: the original size, nothing cropped, the size wanted.
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device)
    hidden, pooled = (given, pooled) if prompt is not None else (null, null_pooled)
    added = {"text_embeds": pooled, "time_ids": sizes.to(pooled.dtype)}
    return _one_row({"encoder_hidden_states": hidden, "added_cond_kwargs": added})


def _pixart(pipe: Any, prompt: str | None, wording: Wording, device: torch.device) -> Inputs:
    given, mask, null, null_mask = pipe.encode_prompt(
        prompt or "",
        prompt is None,
        negative_prompt=wording.negative,
        device=device,
        max_sequence_length=wording.max_length,
    )
    hidden, mask = (given, mask) if prompt is not None else (null, null_mask)
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if wording.tells_size:
        height, width = wording.size
        added["resolution"] = torch.tensor([[height, width]], device=device, dtype=hidden.dtype)
        added["aspect_ratio"] = torch.tensor([[height / width]], device=device, dtype=hidden.dtype)
    return _one_row(
        {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": added,
        }
    )


def _sd3(pipe: Any, prompt: str | None, wording: Wording, device: torch.device) -> Inputs:
    given, null, pooled, null_pooled = pipe.encode_prompt(
        prompt=prompt or "",
        prompt_2=None,
        prompt_3=None,
        device=device,
        do_classifier_free_guidance=prompt is None,
        negative_prompt=wording.negative or None,
        max_sequence_length=wording.max_length,
    )
    hidden, pooled = (given, pooled) if prompt is not None else (null, null_pooled)
    return _one_row({"encoder_hidden_states": hidden, "pooled_projections": pooled})


def _flux(pipe: Any, prompt: str | None, wording: Wording, device: torch.device) -> Inputs:
    hidden, pooled, text_ids = pipe.encode_prompt(
        prompt=wording.negative if prompt is None else prompt,
        prompt_2=None,
        device=device,
        max_sequence_length=wording.max_length,
    )
    # A token holds 2 x 2 cells.
    height, width = (side // 2 for side in wording.cells)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    arguments = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    if wording.guidance is not None:
        arguments["guidance"] = torch.tensor([wording.guidance], device=device)
    shared = {"txt_ids": text_ids, "img_ids": places.to(text_ids)}
    return Inputs.of({**arguments, **shared}, 1, tuple(shared))


def _one_row(arguments: Mapping[str, Any]) -> Inputs:
    return Inputs.of(arguments, 1)


ENCODE: Mapping[str, Encode] = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}
