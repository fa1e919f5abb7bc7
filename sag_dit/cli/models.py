"""The model that a configuration names: one of classes, or of text with its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sag_dit.bounds import shown
from sag_dit.cli.keys import Draws, Text
from sag_dit.cli.keys.key import to_dict

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model


def load_model(config: Draws, requests: str | None = None) -> Model:
    """Load ``ckpt``; a text model's classes are ``prompt``, or the prompts in a file of requests.

    Raises:
        ValueError: it cannot be loaded, or a text model has no prompt, or another model has one.
    """
    from sag_dit.checkpoints import is_text, load, load_text
    from sag_dit.data.requests import prompts_in

    prompt, text = config.prompt, config.text
    size = None if text.size is None else (text.size[0], text.size[1])
    if prompt is not None and (requests is not None or config.classes is not None):
        raise ValueError("prompt: expected it alone; give several prompts by requests=FILE")
    if prompt is None and (requests is None or not is_text(config.ckpt)):
        _refuse_text(text, config.ckpt)
        return load(
            config.ckpt, ema=config.ema, vae=config.vae, num_heads=config.num_heads, size=size
        )
    if config.num_heads is not None:
        raise ValueError(f"num_heads={config.num_heads}: a text model's folder tells; leave it out")
    if config.ema is not True:
        raise ValueError(f"ema={shown(config.ema)}: a text model's folder holds one set of weights")
    return load_text(
        config.ckpt,
        [prompt] if prompt is not None else prompts_in(requests or ""),
        negative_prompt=text.negative or "",
        size=size,
        guidance=None if text.guidance is None else float(text.guidance),
        vae=config.vae,
    )


def _refuse_text(text: Text, ckpt: str) -> None:
    """Refuse settings of text models where a model of classes is loaded.

    Raises:
        ValueError: one is set.
    """
    from sag_dit.checkpoints import is_text

    for name, value in to_dict(text).items():
        # A text model without a prompt is told of that.
        if name != "size" and value not in (None, "") and not is_text(ckpt):
            raise ValueError(
                f"text.{name}={value}: ckpt={ckpt} is asked with classes, and text is for "
                f"models that are asked with prompt or requests; leave it out"
            )
