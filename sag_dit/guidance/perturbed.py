"""What PAG, SEG, SLG, TPG and TSG share: guidance away from a perturbed network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from sag_dit.attention import AttentionLayer, Edit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, BranchTerm, Question

Layer = str | int
"""The name of a self-attention layer, or its number in the order of the model's."""


def check_attends(term: BranchTerm, model: Denoiser) -> None:
    """Refuse a model without self-attention layers for a term that reads or edits them.

    Raises:
        ValueError: there are none; how the term is left out is told.
    """
    if not model.layers:
        raise ValueError(
            f"{term.key}_scale={term.scale}: this model has no self-attention layers to read; "
            f"leave {term.title} out: {term.key}_scale=0"
        )


def layers_of(model: Denoiser, wanted: Layer | Sequence[Layer]) -> tuple[AttentionLayer, ...]:
    """Return layers by name (``auto`` is the middle of the depth) or by number.

    Raises:
        ValueError: one does not exist; the message lists the layers that do.
    """
    asked = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
    names = list(model.layers)
    for each in asked:
        if isinstance(each, int) and not -len(names) <= each < len(names):
            raise ValueError(f"layer {each}: expected 0 to {len(names) - 1}, the model's layers")
    return tuple(
        model.layers[names[each]] if isinstance(each, int) else model.layer(each) for each in asked
    )


def checked_layers(name: str, wanted: object) -> Layer | tuple[Layer, ...]:
    """Return a term's layer or layers as they can be compared and kept.

    Raises:
        ValueError: no layer, or what is neither a name nor a number.
    """
    listed = tuple(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else None
    each = (wanted,) if listed is None else listed
    if not each or not all(
        isinstance(one, (str, int)) and not isinstance(one, bool) for one in each
    ):
        raise ValueError(
            f"{name}={wanted!r}: expected the name or number of a self-attention layer, several, "
            f"or auto, the middle of the depth"
        )
    return each if listed is not None else each[0]


def block_of(model: Denoiser, layer: AttentionLayer) -> str:
    """Return the name of the block of a self-attention layer: the module around it.

    In some UNets attention layers stand by themselves in a list, with their residual connection
    inside. There the block is the layer itself.
    """
    around = layer.name.rpartition(".")[0]
    alone = isinstance(model.network.get_submodule(around), (nn.ModuleList, nn.Sequential))
    return layer.name if alone else around


@dataclass(frozen=True)
class Perturbed(BranchTerm):
    """pred + s (pred - perturbed): both at the same x_t, so s (v - v_perturbed) in any space.

    s = 0 is off. ``layers`` names the self-attention layers that are perturbed. ``branch`` says in
    which prediction; as published it is that of the given condition.

    Raises:
        ValueError: ``layers`` is empty, or the model lacks a layer or the null condition.

    Example::

        @dataclass(frozen=True)
        class WithoutAttention(Perturbed):
            def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
                return tuple(Skip(layer.name) for layer in layers)
    """

    search = MappingProxyType({"layers": "each layer"})

    _: KW_ONLY
    layers: Layer | Sequence[Layer] = "auto"
    """Self-attention layers by name or number; auto: in the middle of the depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", checked_layers("layers", self.layers))

    def check(self, model: Denoiser) -> None:
        """Refuse layers or a branch that the model does not have."""
        super().check(model)
        check_attends(self, model)
        layers_of(model, self.layers)

    def identity(self, model: Denoiser) -> dict[str, Any]:
        """Return the term with its layers by name."""
        names = [layer.name for layer in layers_of(model, self.layers)]
        return {**super().identity(model), "layers": names}

    @abstractmethod
    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Return what is done to the network."""

    def contribution(self, ask: Question) -> Asking:
        """Return s (v - v_perturbed)."""
        branch = ask.branch(self.branch)
        edits = self.edits(layers_of(branch.model, self.layers), ask)
        good, worse = yield branch, branch.edited(*edits)
        return self.scale * (good.v - worse.v)
