"""The arithmetic of drawing, as ``speed`` and its keys have it: applied to a model, and told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sag_dit.cli.keys import Guides

if TYPE_CHECKING:
    import torch

    from sag_dit.checkpoints import Model

WORDS = {
    "bf16-true": "bf16",
    "16-true": "fp16",
    "bf16-mixed": "bf16 by autocast",
    "16-mixed": "fp16 by autocast",
}
"""What precisions are called in a line."""
PRODUCTS = {"high": "TF32", "medium": "float32 products in bf16"}


def network_precision(config: Guides) -> str:
    """Return the precision of the network, as Lightning names it."""
    return str(config.trainer.get("precision") or "32-true")


def in_arithmetic(model: Model, config: Guides) -> Model:
    """Return a model that was just loaded, decoding as configured and compiled if asked for.

    Raises:
        ValueError: its network cannot be compiled.
    """
    import torch

    how = config.decoding
    dtype = torch.float32 if how.precision == "32-true" else torch.bfloat16
    codec = model.codec.computing(how.batch_size, dtype, how.channels_last)
    if config.compile:
        try:
            model.denoiser.compile_blocks()
        except ValueError as error:
            raise ValueError(f"compile=true: {error}; expected compile=false") from error
    return replace(model, codec=codec)


def emulated(config: Guides, device: torch.device) -> str:
    """Return a line where the device only emulates bfloat16, which is slow; else nothing."""
    import torch

    words = (network_precision(config), config.decoding.precision)
    asked = device.type == "cuda" and any("bf16" in each for each in words)
    if not asked or torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    return (
        f"speed: {torch.cuda.get_device_name(device)} emulates bfloat16, which is slow; "
        f"trainer.precision=16-true and decoding.precision=32-true are faster there"
    )


def speed_told(config: Guides, model: Model) -> str:
    """Return a line that tells the arithmetic; empty where all is float32, one image at a time."""
    from sag_dit.codec import VAECodec

    precision, how, told = network_precision(config), config.decoding, list[str]()
    if precision != "32-true":
        told.append(f"network {WORDS.get(precision, precision)}")
    if config.matmul != "highest":
        told.append(PRODUCTS[config.matmul])
    if config.compile:
        told.append("compiled")
    decodes = isinstance(model.codec, VAECodec)  # Pixels need none.
    if decodes and how.precision != "32-true":
        told.append(f"decoding {WORDS[how.precision]}")
    if decodes and how.batch_size > 1:
        told.append(f"{how.batch_size} latents decoded at once")
    return f"speed: {', '.join(told)}" if told else ""
