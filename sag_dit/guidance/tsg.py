"""Time-step guidance (Sadat et al., ICLR 2025, arXiv 2407.02687)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from sag_dit.attention import InputEdit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, BranchTerm, Question
from sag_dit.models.network import TimeEmbedded
from sag_dit.process import Step

PURPOSE = 5


@dataclass(frozen=True, eq=False)
class Shifted(InputEdit):
    """What enters a module is moved by so much.

    Example::

        worse = branch.edited(Shifted("blocks.0.adaLN_modulation", by))
    """

    by: Tensor

    def edit_input(self, x: Tensor) -> Tensor:
        """Return the moved input."""
        return x + self.by.to(x)


@dataclass(frozen=True)
class TSG(BranchTerm):
    """pred = perturbed + w (pred - perturbed), where the time embedding is noisy; w = 1 is off.

    t_emb' = t_emb + ``noise`` u^``power`` std(t_emb) n, with n standard normal and u the share
    of the noisiest time, enters the first ``depth`` blocks. Every image and step has its own n.

    Published: DiT-XL/2 with classes w = 2.5, noise 2, power 1, depth 10; without w = 5, noise 1,
    power 0 (the schedule "constant"), interval (200, 800) in t.

    Source: section 5 and appendix G of the paper. It leaves two things open, which were chosen: t
    runs over [0, 1], and the embedding is the one after the MLP.

    Raises:
        ValueError: ``noise`` or ``depth`` is not positive, or the model is not a DiT.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[TSG(2.5, noise=2.0, depth=10)])
    """

    key = "tsg"
    former = ("sag_dit.guidance.tsg.TSG",)
    title = "TSG"
    does = "away from a wrong time"
    moves = "away from what the model draws at a wrong noise level"
    look = "outlines and details"
    source = "Sadat et al. 2024"
    needs = frozenset({"dit"})
    search = MappingProxyType({"noise": (0.5, 4.0)})

    neutral: ClassVar[float] = 1.0

    _: KW_ONLY
    noise: float = 2.0
    """Of the time embedding, in its standard deviations."""
    power: float = 1.0
    """How fast the noise fades towards the image; 0: not at all."""
    depth: int = 10
    """The first so many blocks are given the noisy embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise <= 0:
            raise ValueError(f"noise={self.noise}: expected more than 0")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: expected 1 or more blocks")

    def check(self, model: Denoiser) -> None:
        """Refuse a model whose time embedding is not known."""
        super().check(model)
        if not isinstance(model.network, TimeEmbedded):
            raise ValueError(
                f"tsg_scale={self.scale}: guides DiT models only, as sag_dit.load reads them; set "
                f"tsg_scale=1"
            )

    def active(self, step: Step) -> bool:
        """Rest at time 0 too, where the noise has faded, unless its power is 0."""
        return super().active(step) and (self.power == 0 or float(step.level.t) > 0)

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v - v_perturbed)."""
        branch = ask.branch(self.branch)
        network, process, level = branch.model.network, branch.model.process, ask.step.level
        assert isinstance(network, TimeEmbedded)
        embedding = network.embed_time(level.times(branch.x_t)[:1])
        time = process.elapsed(level)
        # The noise: fading with u, as large as the embedding's own spread, each image's own.
        n = ask.draw(embedding.shape[1:], PURPOSE)
        by = self.noise * time**self.power * embedding.std() * n
        # It enters the modulation of the first blocks, as an edit of their input.
        edits = [Shifted(name, by) for name in network.time_inputs[: self.depth]]
        good, worse = yield branch, branch.edited(*edits)
        return torch.as_tensor((self.scale - 1) * (good.v - worse.v))
