"""S^2-Guidance: stochastic self-guidance (Chen et al., ICLR 2026, arXiv 2508.12880)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool
from torch import Tensor

from sag_dit.attention import OutputEdit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.perturbed import block_of
from sag_dit.guidance.term import Asking, BranchTerm, Question

PURPOSE = 20


@dataclass(frozen=True, eq=False)
class SkipFor(OutputEdit):
    """The module returns what it was given, for some of the images.

    Example::

        worse = branch.edited(SkipFor("blocks.5", torch.tensor([True, False])))
    """

    images: Bool[Tensor, "r"]

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the input of these images, the output of the others."""
        return torch.where(self.images.view(-1, *[1] * (output.ndim - 1)), x, output)


@dataclass(frozen=True)
class S2(BranchTerm):
    """pred + s (pred - pred without some blocks, drawn anew at every step); s = 0 is off.

    A ``share`` of the blocks, at least one, is skipped. Every image draws its own at every step,
    from its own randomness: the paper draws once a step and has one image, and images of a batch
    must not share what is random. The blocks that are skipped for some images are computed for the
    others, so a row costs a whole pass.

    Others' code has s = 0.25 and a tenth of the blocks, beside CFG.

    Source: the paper, which finds one draw a step enough, in the form of SLG; its authors have
    published no code.

    Raises:
        ValueError: ``share`` is not in (0, 1], or the model has no blocks or no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CFG(1.5), S2(0.25)])
    """

    key = "s2"
    title = "S^2-Guidance"
    does = "away from random skipped blocks"
    moves = "away from what the model draws without some of its blocks, others at each step"
    look = "how its parts fit together"
    source = "Chen et al. 2025"
    search = MappingProxyType({"share": (0.05, 0.5)})

    _: KW_ONLY
    share: float = 0.1
    """Of the blocks, how many are skipped; at least one is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: expected more than 0, at most 1, of the blocks")

    def check(self, model: Denoiser) -> None:
        """Refuse a model without blocks that attend."""
        super().check(model)
        if not model.layers:
            raise ValueError(
                f"s2_scale={self.scale}: this model has no self-attention layers, around which "
                f"blocks could be skipped; set s2_scale=0"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return s (v - v_skipped)."""
        branch = ask.branch(self.branch)
        layers = branch.model.layers.values()
        blocks = list(dict.fromkeys(block_of(branch.model, layer) for layer in layers))
        # Each image skips the blocks of its smallest numbers.
        count = max(1, round(self.share * len(blocks)))
        skipped = ask.draw((len(blocks),), PURPOSE).argsort(dim=1).argsort(dim=1) < count
        edits = [SkipFor(block, skipped[:, i]) for i, block in enumerate(blocks)]
        good, worse = yield branch, branch.edited(*edits)
        return self.scale * (good.v - worse.v)
