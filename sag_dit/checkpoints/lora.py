"""Weights with LoRA adapters, as a fine-tuning run's checkpoints hold them, made plain ones.

The adapters bear peft's names, but reading them takes no peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

BASE = ".base_layer."
DOWN = ".lora_A.default.weight"
UP = ".lora_B.default.weight"


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add adapters to the weights they adapt and return plain weights under their plain names.

    W + (alpha / rank) B A, where A is (rank, in), B is (out, rank) and W is (out, in). ``lora``
    is what the checkpoint's config says of them, rank and alpha.

    Raises:
        ValueError: ``lora`` lacks these, or an adapted layer its adapter.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """
    try:
        scale = lora["alpha"] / lora["rank"]
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f"lora={lora!r}: expected the numbers rank and alpha") from None
    plain = {}
    for name, tensor in state.items():
        if name.endswith((DOWN, UP)):
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            if layer + UP not in state or layer + DOWN not in state:
                raise ValueError(f"lora={dict(lora)}: {layer} lacks {layer + UP} or {layer + DOWN}")
            tensor = tensor + scale * (state[layer + UP] @ state[layer + DOWN])
        plain[name.replace(BASE, ".")] = tensor
    return plain
