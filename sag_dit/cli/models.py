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

    if config.ckpt is None:
        raise ValueError("ckpt=null: expected a model to draw from, such as ckpt=digits")
    prompt = OmegaConf.select(config, "prompt")
    if prompt is not None and (config.requests is not None or config.classes is not None):
        raise ValueError("prompt: expected it alone; give several prompts by requests=FILE")
    if prompt is None and (config.requests is None or not is_text(config.ckpt)):
        _refuse_text(config)
        return load(config.ckpt, ema=config.ema, vae=config.vae)
    if not config.ema:
        raise ValueError("ema=false: a text model's folder holds one set of weights")
    size = config.text.size
    return load_text(
        config.ckpt,
        prompts_in(config.requests) if prompt is None else [str(prompt)],
        negative_prompt=str(OmegaConf.select(config, "text.negative") or ""),
        size=None if size is None else (size[0], size[1]),
        guidance=None if config.text.guidance is None else float(config.text.guidance),
        vae=config.vae,
    )


def _refuse_text(config: DictConfig) -> None:
    """Refuse settings of text models where a model of classes is loaded.

    Raises:
        ValueError: one is set.
    """
    from sag_dit.checkpoints import is_text

    for name in ("negative", "size", "guidance"):
        value = OmegaConf.select(config, f"text.{name}")
        # A text model without a prompt is told of that.
        if value not in (None, "") and not is_text(config.ckpt):
            raise ValueError(
                f"text.{name}={value}: ckpt={config.ckpt} is asked with classes, and text is for "
                f"models that are asked with prompt or requests; leave it out"
            )
