"""LoRA: fine-tuning a few added parameters while the checkpoint's own weights stay as they are.

Checkpoints hold the adapters beside the weights, see :mod:`sag_dit.checkpoints.formats`; the model
that a run exports has them merged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sag_dit.training.finetune import matching

TARGETS = ("blocks.*.attn", "blocks.*.mlp")
"""The attention and MLP layers of a DiT."""


@dataclass(frozen=True)
class LoRA:
    """What is added to a linear layer of weight W: W x + (alpha / rank) B A dropout(x).

    A is (rank, in) and starts random, B is (out, rank) and starts at zero, so that the first step
    begins at the checkpoint. ``alpha`` is the rank unless given. ``targets`` are patterns of layers
    or of modules, which stand for all linear layers in them.

    Raises:
        ValueError: a value out of its range, or peft is not installed.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.

    Example::

        layers = add_adapters(network, LoRA(rank=16))
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] = TARGETS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: expected a number from 1 on, null for none")
        if self.alpha is not None and not (_is_real(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha={self.alpha}: expected more than 0, null for the rank")
        if not (_is_real(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"lora.dropout={self.dropout}: expected 0 to less than 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"lora.targets={self.targets}: expected a list such as {[*TARGETS]}")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(
                f"lora.rank={self.rank}: LoRA needs peft, which is not installed; "
                f"pip install sag_dit[lora]"
            )

    @property
    def description(self) -> dict[str, Any]:
        """What it takes to merge the adapters, as plain values."""
        alpha = self.rank if self.alpha is None else self.alpha
        return {"rank": self.rank, "alpha": float(alpha)}


def add_adapters(network: nn.Module, lora: LoRA, frozen: Collection[str] = ()) -> tuple[str, ...]:
    """Give layers adapters, exclude all else from training, and return the layers' names.

    A layer whose weight is among ``frozen`` gets none.

    Raises:
        ValueError: a pattern matches no linear layer, or only frozen ones are left.
    """
    # Imported here, since peft is an extra and imports transformers.
    from peft import LoraConfig, inject_adapter_in_model

    # Which layers: those that match, unless they are frozen.
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in lora.targets:
        found = matching(linear, pattern)
        if not found:
            raise ValueError(
                f"lora.targets: {pattern!r} matches no linear layer; expected names or patterns "
                f"such as {', '.join(TARGETS)}, {linear[-1]}"
            )
        chosen |= found
    layers = [name for name in linear if name in chosen and f"{name}.weight" not in frozen]
    if not layers:
        raise ValueError("lora.targets: all of them are frozen; expected some that freeze leaves")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.description["alpha"],
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
    inject_adapter_in_model(config, network)
    return tuple(layers)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
