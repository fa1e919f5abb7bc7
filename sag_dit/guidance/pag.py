"""Perturbed-attention guidance (Ahn et al., ECCV 2024, arXiv 2403.17377), soft and by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from sag_dit.attention import AttentionEdit, AttentionLayer, Edit, Span
from sag_dit.attention.edits import Attend
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.perturbed import Perturbed, layers_of
from sag_dit.guidance.term import Question
from sag_dit.identity import LATER
from sag_dit.tensors import sent


@dataclass(frozen=True)
class IdentityAttention(AttentionEdit):
    """The image's tokens look at themselves only, and at what else is in the sequence (text).

    With ``softness`` u below 1 the map is (1 - u) of what it was and u of that. Only ``heads`` are
    changed, where they are given.

    Example::

        worse = branch.edited(IdentityAttention("blocks.5.attn"))
    """

    tokens: Span | None = None
    softness: float = 1.0
    heads: tuple[int, ...] | None = None

    def perturbed(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Return the values themselves, or attend with an identity as the block of the image."""
        if self.tokens is None:
            return value
        n = query.shape[-2]
        image = torch.zeros(n, dtype=torch.bool, device=query.device)
        image[slice(*self.tokens)] = True
        diagonal = torch.eye(n, dtype=torch.bool, device=query.device)
        return attend(query, key, value, ~(image[:, None] & image) | diagonal)

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Mix the two outputs, which are linear in the maps."""
        found = self.perturbed(query, key, value, attend)
        if self.softness == 1 and self.heads is None:
            return found
        plain = attend(query, key, value)
        found = plain.lerp(found.to(plain), self.softness)
        if self.heads is None:
            return found
        check_heads(self.heads, query.shape[1], self.module)
        chosen = torch.tensor([each in self.heads for each in range(query.shape[1])])
        return torch.where(sent(chosen, query.device)[:, None, None], found, plain)


def check_heads(heads: Sequence[int], number: int, layer: str) -> None:
    """Refuse heads that a layer does not have.

    Raises:
        ValueError: one is not among the layer's ``number`` heads.
    """
    lost = [each for each in heads if not 0 <= each < number]
    if lost:
        raise ValueError(f"head {lost[0]} of layer {layer!r}: expected 0 to {number - 1}")


@dataclass(frozen=True)
class PAG(Perturbed):
    """pred + s (pred - pred with identity self-attention in ``layers``); s = 0 is off.

    SoftPAG's attention map is (1 - u) A + u I, with the ``softness`` u in (0, 1]; u = 1 is PAG.
    ``heads`` perturbs these heads of every layer alone, as HeadHunter chooses them; a list for each
    of ``layers`` perturbs other heads in each.

    Published: Stable Diffusion s = 3 in the middle block, with CFG at w = 4 or without; Stable
    Diffusion 3 (diffusers' example) s = 0.7 in block 13 with w = 5. ADM's commands count g = s + 1
    from 1.

    Source: equations 16 and 17 of the paper; softness and heads: Ahn et al. 2025, arXiv 2506.10978.

    Raises:
        ValueError: ``softness`` is not in (0, 1], or heads are none, or not of the layers.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[PAG(3.0, layers=[5, 6], heads=[[0, 3], [1]])])
    """

    key = "pag"
    former = ("sag_dit.guidance.pag.PAG",)
    title = "PAG"
    does = "away from attention to oneself alone"
    moves = "away from one whose parts do not look at each other"
    look = "how its parts fit together"
    source = "Ahn et al. 2024"
    variants = MappingProxyType({"PAG, soft": "PAG(softness=...)", "PAG, heads": "PAG(heads=...)"})

    _: KW_ONLY
    softness: float = field(default=1.0, metadata=LATER)
    """How far towards the identity, up to 1: all of it."""
    heads: Sequence[int] | Sequence[Sequence[int]] | None = field(default=None, metadata=LATER)
    """Heads that are perturbed, in every layer or a list for each; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.softness <= 1:
            raise ValueError(f"softness={self.softness}: expected more than 0, at most 1")
        object.__setattr__(self, "heads", checked_heads(self.heads))

    def check(self, model: Denoiser) -> None:
        """Refuse heads that the layers do not have, where modules tell how many they have."""
        super().check(model)
        layers = layers_of(model, self.layers)
        for layer, heads in zip(layers, self.heads_of(len(layers)), strict=True):
            module = model.network.get_submodule(layer.name)
            number = getattr(module, "num_heads", getattr(module, "heads", None))
            if heads is not None and isinstance(number, int):
                check_heads(heads, number, layer.name)

    def heads_of(self, layers: int) -> list[tuple[int, ...] | None]:
        """Return the heads of each of so many layers.

        Raises:
            ValueError: there is a list for each layer, and not as many of them.
        """
        listed: tuple | None = self.heads  # type: ignore[assignment, type-arg]
        if listed is None or isinstance(listed[0], int):
            return [listed] * layers
        if len(listed) != layers:
            raise ValueError(
                f"heads={self.heads}: expected a list for each of the {layers} layers, or numbers"
            )
        return [*listed]

    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Make the attention of every layer the identity."""
        return tuple(
            IdentityAttention(layer.name, layer.span, self.softness, heads)
            for layer, heads in zip(layers, self.heads_of(len(layers)), strict=True)
        )


def checked_heads(wanted: object) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
    """Return heads as they can be compared and kept: numbers, or a list of them for each layer.

    Raises:
        ValueError: none is named, or something else than numbers.
    """

    def numbers(each: object) -> bool:
        return type(each) is int and each >= 0

    if wanted is None:
        return None
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and wanted:
        if all(map(numbers, wanted)):
            return tuple(wanted)
        if all(isinstance(each, Sequence) and each and all(map(numbers, each)) for each in wanted):
            return tuple(map(tuple, wanted))
    raise ValueError(
        f"heads={wanted!r}: expected numbers of heads from 0, such as [0, 3], a list of them for "
        f"each layer, or null for all"
    )
