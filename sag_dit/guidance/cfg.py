"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, Question, Term


@dataclass(frozen=True)
class CFG(Term):
    """Classifier-free guidance: pred = null + w (cond - null), so w = 1 is off.

    As a contribution to the conditional base: (w - 1) (v_cond - v_null). ``channels`` limits it to
    the first so many; 3 is the quirk of the published DiT sampler.

    Source: Ho & Salimans 2022, equation 6 (there w counts from 0).

    Raises:
        ValueError: ``channels`` is not positive, or the model has fewer or no null condition.
    """

    from_null: ClassVar[bool] = True

    scale: float = 1.0
    _: KW_ONLY
    channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels={self.channels}: expected 1 or more, or null for all")

    @property
    def off(self) -> bool:
        """Scale 1 is the conditional model itself."""
        return self.scale == 1

    def check(self, model: Denoiser) -> None:
        """Refuse a model without a null condition or with fewer channels than guided."""
        if model.null(1) is None:
            raise ValueError(
                f"cfg_scale={self.scale}: this model has no null condition (trained without label "
                f"dropout), so classifier-free guidance is impossible; set cfg_scale=1"
            )
        if self.channels is not None and self.channels > model.latent_shape[0]:
            raise ValueError(
                f"channels={self.channels}: the model has {model.latent_shape[0]} channels"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v_cond - v_null)."""
        cond, null = yield ask.base, ask.required_null()
        difference = (self.scale - 1) * (cond.v - null.v)
        if self.channels is None:
            return difference
        unguided = torch.zeros_like(difference[:, self.channels :])
        return torch.cat([difference[:, : self.channels], unguided], dim=1)
