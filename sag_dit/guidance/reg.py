"""Rectified gradient guidance, REG (Gao et al., ICML 2025, arXiv 2501.18865)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sag_dit.attention import Capture, Edit
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.models.network import Fork, Outputs
from sag_dit.process import NoiseLevel, Prediction, Step
from sag_dit.tensors import Images


class Sensitivity(Denoiser):
    """A denoiser asked for a gradient: its v is that of the sum of another's v by x_t.

    Example::

        slope = Sensitivity(denoiser)(x_t, level, labels).v
    """

    passes = 2.0

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model
        self.network, self.process, self.kind = model.network, model.process, model.kind
        self.latent_shape, self.x_0_range = model.latent_shape, model.x_0_range
        self.layers, self.aliases = model.layers, model.aliases

    def forward(
        self,
        x_t: Images,
        level: NoiseLevel,
        cond: Condition,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, slice]] = (),
        forks: Sequence[Fork] = (),
        outputs: Outputs | None = None,
    ) -> Prediction:
        """Evaluate one batch, each image's sum by itself."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            said = self.model(x, level, cond, captures, edits, forks)
            (gradient,) = torch.autograd.grad(said.v.sum(), x)
        return Prediction(x_t=x_t, level=level, v=gradient)

    def evaluate(self, x_t: Images, t: Tensor, cond: Condition) -> Images:
        """Return what the network itself says."""
        return self.model.evaluate(x_t, t, cond)

    def null(self, count: int) -> Condition | None:
        """Return the model's null condition."""
        return self.model.null(count)

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch."""
        return self.model.join(conditions)


@dataclass(frozen=True)
class REG(Term):
    """CFG times how much a pixel of the image follows x_t: pred = cond + (w - 1) R (cond - null).

    R = 1 - sigma d(sum of eps_cond) / dx_t, pixel by pixel, which is alpha (d_sigma - sigma d(sum
    of v_cond) / dx_t) for every process. It brings CFG nearer to what scales the joint
    distribution of a whole run. At alpha = 0 it is 0, so that nothing is asked there. w = 1 is off.

    The gradient takes one more conditional pass and its way back, beside CFG's two: together the
    price of four passes, and the memory of training with one batch.

    Published: DiT-XL/2 at the scales of CFG, with interval (205, 502] in t.

    Source: zhengqigao/REG, ``DiT/forward_with_cfg.py``, where w counts from 0.

    Raises:
        ValueError: the scale is not finite, or the model has no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[REG(1.5)])
    """

    key = "reg"
    title = "REG"
    does = "CFG times how much a pixel follows its noisy image"
    moves = "towards what was asked for, where the image is open"
    look = "how well it shows what was asked for"
    source = "Gao et al. 2025"

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    def active(self, step: Step) -> bool:
        """Rest at pure noise too, where R is 0."""
        return super().active(step) and float(step.level.alpha) != 0

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) R (v_cond - v_null)."""
        model = ask.memory.setdefault("model", Sensitivity(ask.base.model))
        sloped = replace(ask.base, model=model, captures=())
        cond, null, slope = yield ask.base, ask.required_null(), sloped
        level = cond.level
        factor = level.alpha * (level.d_sigma - level.sigma * slope.v)
        return torch.as_tensor((self.scale - 1) * factor * (cond.v - null.v))
