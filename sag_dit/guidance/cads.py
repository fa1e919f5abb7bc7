"""Condition annealing, CADS (Sadat et al., ICLR 2024, arXiv 2310.17347)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from sag_dit.attention import OutputEdit
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Question, Rewriting
from sag_dit.models.network import ClassEmbedded

PURPOSE = 8


@dataclass(frozen=True, eq=False)
class Noised(OutputEdit):
    """A module's output y becomes keep y + noise n, ``mixing`` of it with y's mean and deviation.

    ``draw`` returns standard normal n (b, d) of a width d.

    Example::

        edit = Noised("y_embedder", keep=0.8, noise=0.1, mixing=1.0, draw=draw)
    """

    keep: float
    noise: float
    mixing: float
    draw: Callable[[int], Tensor]

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the noisy output."""
        y = output.float()
        noisy = self.keep * y + self.noise * self.draw(y.shape[-1])
        spread, mean = torch.std_mean(noisy, dim=-1, keepdim=True)
        like_y = (noisy - mean) / spread * y.std(-1, keepdim=True) + y.mean(-1, keepdim=True)
        return self.mixing * like_y + (1 - self.mixing) * noisy


@dataclass(frozen=True)
class CADS(Rewriting):
    """The class is asked with noise in its embedding, which fades during the run; s = 0 is off.

    y' = sqrt(gamma) y + s sqrt(1 - gamma) n, with n standard normal. gamma is 0 down to the time
    ``tau_2``, rises to 1 at ``tau_1``, and the class is as given from there on; times are shares
    of the noisiest. ``mixing`` psi of y' is brought back to the mean and the deviation of y. Images
    of a class become more diverse. Every image and step has its own n.

    It costs nothing: the conditional prediction itself is asked so, for all other methods too, and
    CFG's null prediction is not. A schedule multiplies s.

    Published: s from 0.025 to 0.25 and psi = 1, tau_1 from 0.2 (much noise) to 0.9 (little).

    Source: section 3 of the paper.

    Raises:
        ValueError: the times are not 0 <= tau_1 < tau_2 <= 1, psi is not in [0, 1], or the model is
            not one of several classes whose embedding is known.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CADS(0.1), CFG(4.0)])
    """

    key = "cads"
    title = "CADS"
    does = "asked with noise in the class, which fades"
    moves = "away from what most images of a class look like"
    look = "how much it differs from others of its class"
    source = "Sadat et al. 2024"
    needs = frozenset({"classes"})
    example = MappingProxyType({"tau_1": 0.0})
    search = MappingProxyType({"scale": (0.025, 0.25), "tau_1": (0.2, 0.8)})

    _: KW_ONLY
    tau_1: float = 0.6
    """Below this share of the noisiest time the class is as given."""
    tau_2: float = 0.9
    """Above this share of the noisiest time it is noise alone."""
    mixing: float = 1.0
    """How much of it gets back the mean and the deviation of the embedding, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau_1 < self.tau_2 <= 1:
            raise ValueError(
                f"tau_1={self.tau_1}, tau_2={self.tau_2}: expected 0 <= tau_1 < tau_2 <= 1"
            )
        if not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing={self.mixing}: expected psi from 0 to 1")

    def check(self, model: Denoiser) -> None:
        """Refuse a model that knows one class only, or whose embedding of classes is not known."""
        super().check(model)
        network = model.network
        if not isinstance(network, ClassEmbedded) or getattr(model, "num_classes", 0) < 2:
            raise ValueError(
                f"cads_scale={self.scale}: needs a model of two or more classes that names the "
                f"module which embeds them, class_embedder; set cads_scale=0"
            )

    def rewritten(self, ask: Question) -> Question:
        """Return the question with noise in the embedding of the base's class, until it fades."""
        model, time = ask.base.model, ask.base.model.process.elapsed(ask.step.level)
        gamma = min(max((self.tau_2 - time) / (self.tau_2 - self.tau_1), 0.0), 1.0)
        if gamma == 1:
            return ask
        network = model.network
        assert isinstance(network, ClassEmbedded)
        edit = Noised(
            network.class_embedder,
            gamma**0.5,
            self.scale * self.weight(ask.step) * (1 - gamma) ** 0.5,
            self.mixing,
            lambda width: ask.draw((width,), PURPOSE),
        )
        return replace(ask, base=ask.base.edited(edit))
