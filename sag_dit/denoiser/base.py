"""Denoiser: what guidance and samplers see of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap, Capture, Edit
from sag_dit.process import NoiseLevel, Prediction, Process
from sag_dit.process.base import OutputKind
from sag_dit.tensors import Images

Condition: TypeAlias = Any
"""What an image is of. A denoiser of one kind knows its own: labels, text embeddings, ..."""


class Denoiser(nn.Module, ABC):
    """A network together with what one must know to ask it.

    Attributes:
        network: the module that is evaluated; names of layers are relative to it.
        process: the forward process it was trained on.
        kind: what the network puts out, ``eps``, ``v``, ``x_0`` or ``score``.
        latent_shape: (c, h, w) of x_t.
        x_0_range: values that a clean x_0 can have, None where unbounded (latents).
        layers: self-attention layers by name.
        aliases: further names of these layers, such as those of the published code.
        class_names: what its images are of: names of classes, or prompts.

    Example:
        >>> import sag_dit
        >>> denoiser = sag_dit.load("digits").denoiser
        >>> level = denoiser.process.grid(50)[0]
        >>> x_t = torch.zeros(1, *denoiser.latent_shape)
        >>> denoiser(x_t, level, denoiser.conditions([3])).x_0.shape
        torch.Size([1, 1, 8, 8])
    """

    network: nn.Module
    process: Process
    kind: OutputKind
    latent_shape: tuple[int, int, int]
    x_0_range: tuple[float, float] | None
    layers: Mapping[str, AttentionLayer]
    aliases: Mapping[str, str] = MappingProxyType({})
    class_names: tuple[str, ...] = ()

    @abstractmethod
    def evaluate(self, x_t: Images, t: Tensor, cond: Condition) -> Images:
        """Call the network once; its output may carry variance channels behind the first c."""

    @abstractmethod
    def null(self, count: int) -> Condition | None:
        """Return the condition 'nothing in particular', or None if the network knows none."""

    @abstractmethod
    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch."""

    def conditions(self, labels: Sequence[int]) -> Condition:
        """Return the condition of images by their labels: numbers of classes, or of prompts."""
        return torch.tensor(labels, device=self.device)

    def forward(
        self,
        x_t: Images,
        level: NoiseLevel,
        cond: Condition,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, slice]] = (),
    ) -> Prediction:
        """Evaluate one batch and say what it predicts.

        Raises:
            ValueError: a captured or edited module does not exist or was not seen attending.
        """
        t = level.times(x_t)
        if captures or edits:
            with AttentionTap(self.network, captures, edits) as tap:
                output = self.evaluate(x_t, t, cond)
            attention = tap.captured
        else:
            output, attention = self.evaluate(x_t, t, cond), {}
        channels = x_t.shape[1]
        fraction = None
        if output.shape[1] == 2 * channels:
            output, variance = output.split(channels, dim=1)
            fraction = (variance.float() + 1) / 2
        prediction = self.process.predict(x_t, level, output.to(x_t.dtype), self.kind)
        return replace(prediction, variance_fraction=fraction, attention=attention)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next(self.network.parameters()).device

    def layer(self, name: str) -> AttentionLayer:
        """Return a self-attention layer by name; ``auto`` is the one in the middle of the depth.

        Raises:
            ValueError: no layer of that name; those that exist are listed.
        """
        name = self.aliases.get(name, name)
        names = list(self.layers)
        if not names:
            raise ValueError(f"layer {name!r}: this model has no self-attention layers to read")
        if name == "auto":
            return self.layers[names[(len(names) - 1) // 2]]
        found = self.layers.get(name) or self.layers.get(f"{name}.attn")
        if found is None:
            known = [*names, *(alias for alias in self.aliases if alias != "auto")]
            raise ValueError(
                f"layer {name!r} does not exist; this model's self-attention layers are "
                f"{', '.join(known)}"
            )
        return found
