"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch

from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.identity import LATER
from sag_dit.process import Prediction
from sag_dit.tensors import Images


def put_out(prediction: Prediction, model: Denoiser) -> Images:
    """Return a prediction as the network puts it out: eps, v or x_0; of a score network eps."""
    # A score is a multiple of eps, so lengths and deviations stand in the same proportion.
    out: Images = getattr(prediction, "eps" if model.kind == "score" else model.kind)
    return out


def read(output: Images, like: Prediction, model: Denoiser) -> Prediction:
    """Return the prediction at ``like``'s image of which :func:`put_out` is ``output``."""
    kind = "eps" if model.kind == "score" else model.kind
    return model.process.predict(like.x_t, like.level, output, kind)


def rescaled(guided: Prediction, cond: Prediction, model: Denoiser, phi: float) -> Prediction:
    """Return the guided prediction with, at phi = 1, the standard deviation of the conditional one.

    out = phi (std(cond) / std(guided)) guided + (1 - phi) guided, per image, where guided and cond
    are what the network puts out: eps, v or x_0. Of a network of scores eps is used.

    Source: Lin et al. 2023, arXiv 2305.08891, equations 15 and 16; there phi = 0.7 with w = 7.5.
    """
    given, out = put_out(cond, model), put_out(guided, model)
    shares = given.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)
    mixed = phi * shares * out + (1 - phi) * out
    return read(mixed, guided, model)


@dataclass(frozen=True)
class CFG(Term):
    """Classifier-free guidance: pred = null + w (cond - null), so w = 1 is off.

    As a contribution to the conditional base: (w - 1) (v_cond - v_null). ``channels`` limits it to
    the first so many; 3 is the quirk of the published DiT sampler. ``rescale`` is phi of
    :func:`rescaled`, 0 being off. With ``interval_in="sigma"`` this is guidance in a limited
    interval.

    Published: DiT-XL/2 w = 1.5 (256 pixels, 3 channels) and 1.5 (512); Stable Diffusion 7.5; EDM2-S
    at 512 pixels w = 2.1 for sigma in (0.28, 2.9].

    Source: Ho & Salimans 2022, equation 6 (there w counts from 0).

    Raises:
        ValueError: ``channels`` is not positive, ``rescale`` is not in [0, 1], or the model has
            fewer channels or no null condition.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[CFG(1.5)])
        limited = CFG(2.1, interval=(0.28, 2.9), interval_in="sigma")
        sag_dit.sample(model, [3, 7], guidance=[limited])
    """

    key = "cfg"
    former = ("sag_dit.guidance.cfg.CFG",)
    title = "CFG"
    does = "null + w (cond - null); also rescaled, or on some channels"
    moves = "towards what was asked for"
    look = "how well it shows what was asked for"
    source = "Ho & Salimans 2022"
    variants = MappingProxyType({"CFG, rescaled": "CFG(rescale=...)"})
    search = MappingProxyType({"rescale": [0.0, 0.7]})

    neutral: ClassVar[float] = 1.0
    from_null: ClassVar[bool] = True

    _: KW_ONLY
    channels: int | None = None
    """The first so many channels are guided; 3 as the published DiT sampler does."""
    rescale: float = field(default=0.0, metadata=LATER)
    """phi of Lin et al., 0 to 1; 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels={self.channels}: expected 1 or more, or null for all")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: expected phi from 0 (off) to 1")

    def check(self, model: Denoiser) -> None:
        """Refuse a model without a null condition or with fewer channels than guided."""
        super().check(model)
        if self.channels is not None and self.channels > model.latent_shape[0]:
            raise ValueError(
                f"channels={self.channels}: the model has {model.latent_shape[0]} channels"
            )

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v_cond - v_null), rescaled."""
        cond, null = yield ask.base, ask.required_null()
        difference = (self.scale - 1) * (cond.v - null.v)
        if self.channels is not None:
            unguided = torch.zeros_like(difference[:, self.channels :])
            difference = torch.cat([difference[:, : self.channels], unguided], dim=1)
        if not self.rescale:
            return difference
        guided = replace(cond, v=cond.v + difference)
        return rescaled(guided, cond, ask.base.model, self.rescale).v - cond.v
