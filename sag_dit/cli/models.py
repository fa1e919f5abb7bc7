"""The model that a configuration names: one of classes, or of text with its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model


def load_model(config: DictConfig) -> Model:
    """Load ``ckpt``; a text model's classes are ``prompt``, or the prompts in ``requests``.

    Raises:
        ValueError: it cannot be loaded, or a text model has no prompt, or another model has one.
    """
    from sag_dit.checkpoints import is_text, load, load_text
    from sag_dit.data.requests import prompts_in

    prompt = OmegaConf.select(config, "prompt")
    if prompt is not None and (config.requests is not None or config.classes is not None):
        raise ValueError("prompt: expected it alone; give several prompts by requests=FILE")
    if prompt is None and (config.requests is None or not is_text(config.ckpt)):
        return load(config.ckpt, ema=config.ema, vae=config.vae)
    if not config.ema:
        raise ValueError("ema=false: a text model's folder holds one set of weights")
    size = OmegaConf.select(config, "text.size")
    whole = size is None or (len(size) == 2 and all(type(side) is int for side in size))
    if not whole:
        raise ValueError(f"text.size={size}: expected [height, width] in pixels, or null")
    return load_text(
        config.ckpt,
        prompts_in(config.requests) if prompt is None else [str(prompt)],
        negative_prompt=str(OmegaConf.select(config, "text.negative") or ""),
        size=None if size is None else (size[0], size[1]),
        guidance=float(OmegaConf.select(config, "text.guidance", default=3.5)),
        vae=config.vae,
    )
