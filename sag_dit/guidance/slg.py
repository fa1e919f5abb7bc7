"""Skip-layer guidance (Stability AI 2024, with Stable Diffusion 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sag_dit.attention import AttentionLayer, Edit, OutputEdit
from sag_dit.guidance.perturbed import Perturbed, block_of
from sag_dit.guidance.term import Question


@dataclass(frozen=True)
class Skip(OutputEdit):
    """The module returns what it was given.

    Example::

        worse = branch.edited(Skip("blocks.5"))
    """

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the input."""
        return x


@dataclass(frozen=True)
class SLG(Perturbed):
    """pred + s (pred - pred without the blocks of ``layers``); s = 0 is off.

    Published: Stable Diffusion 3.5 medium s = 2.8, blocks 7 to 9, interval (0.01, 0.2), with CFG.

    Source: Stability AI's sd3.5 reference code; spatio-temporal skip guidance (Hyung et al. 2024,
    arXiv 2411.18664) is the same for video.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SLG(2.8, layers=[7, 8, 9], interval=(0.01, 0.2))])
    """

    key = "slg"
    former = ("sag_dit.guidance.slg.SLG",)
    title = "SLG"
    does = "away from skipped blocks"
    moves = "away from what the model draws without some of its blocks"
    look = "how its parts fit together"
    source = "Stability AI 2024"

    def edits(self, layers: Sequence[AttentionLayer], ask: Question) -> tuple[Edit, ...]:
        """Skip the block of every layer."""
        return tuple(Skip(block_of(ask.base.model, layer)) for layer in layers)
