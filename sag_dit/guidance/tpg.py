"""Token perturbation guidance (Rajabi et al., NeurIPS 2025, arXiv 2506.10036)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from sag_dit.attention import AttentionLayer, Edit, InputEdit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.perturbed import Perturbed, block_of, layers_of
from sag_dit.guidance.term import Question

PURPOSE = 3


@dataclass(frozen=True, eq=False)
class Shuffle(InputEdit):
    """The tokens that enter a module, in each image's own order.

    Example::

        order = numbers.argsort(dim=1)  # (images, tokens)
        worse = branch.edited(Shuffle("blocks.5", order))
    """

    order: Int[Tensor, "r n"]

    def edit_input(self, x: Tensor) -> Tensor:
        """Return the tokens in another order."""
        if x.ndim != 3 or x.shape[:2] != self.order.shape:
            raise ValueError(
                f"module {self.module!r} was given {tuple(x.shape)}: expected tokens of the image "
                f"alone, {tuple(self.order.shape)} and a width; token perturbation needs "
                f"transformer blocks"
            )
        return x.gather(1, self.order[:, :, None].expand_as(x))


@dataclass(frozen=True)
class TPG(Perturbed):
    """pred + s (pred - pred with shuffled tokens entering the blocks of ``layers``); s = 0 is off.

    Every image, step and layer has an order of its own, from the image's randomness. The tokens
    stay shuffled after the block.

    Published: SDXL s = 3, blocks 6 to 23 of the down-sampling half.

    Source: section 4 of the paper.

    Raises:
        ValueError: the model lacks a layer or the null condition, or has no block around a layer.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[TPG(3.0, layers=[5, 6])])
    """

    key = "tpg"
    former = ("sag_dit.guidance.tpg.TPG",)
    title = "TPG"
    does = "away from shuffled tokens"
    moves = "away from what the model draws with its parts shuffled"
    look = "how its parts fit together"
    source = "Rajabi et al. 2025"
    needs = frozenset({"blocks"})

    def check(self, model: Denoiser) -> None:
        """Refuse layers that are no part of a transformer block, as in the UNets of ADM."""
        super().check(model)
        for layer in layers_of(model, self.layers):
            if block_of(model, layer) == layer.name:
                raise ValueError(
                    f"tpg_scale={self.scale}: layer {layer.name!r} stands among convolutions, and "
                    f"token perturbation needs transformer blocks; set tpg_scale=0"
                )

    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Shuffle what enters the block of every layer."""
        tokens = max(layer.grid[0] * layer.grid[1] for layer in layers)
        numbers = ask.draw((len(layers), tokens), PURPOSE)
        edits = []
        for i, layer in enumerate(layers):
            order = numbers[:, i, : layer.grid[0] * layer.grid[1]].argsort(dim=1)
            edits.append(Shuffle(block_of(ask.base.model, layer), order))
        return tuple(edits)
