"""Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F

from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.tensors import Images, sent

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def smoothed(x: Images) -> Images:
    """Return images blurred by the binomial kernel of Burt and Adelson, edges reflected.

    An image with a side of two pixels or fewer is too small to reflect, and repeats its edges.
    """
    channels = x.shape[1]
    taps = sent(torch.tensor(TAPS, dtype=x.dtype), x.device)
    mode = "reflect" if min(x.shape[2:]) > 2 else "replicate"
    padded = F.pad(x, (2, 2, 2, 2), mode=mode)
    rows = F.conv2d(padded, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)


def bands(x: Images) -> tuple[Images, Images]:
    """Return the low and the high frequencies of images, the two levels of a Laplacian pyramid.

    low = up(down(x)), where down blurs and halves both sides, rounding up, and up doubles and
    blurs; high = x - low, so that their sum is x.
    """
    size = (x.shape[2], x.shape[3])
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    small = F.interpolate(smoothed(x), half, mode="bilinear", align_corners=False)
    low = smoothed(F.interpolate(small, size, mode="bilinear", align_corners=False))
    return low, x - low


@dataclass(frozen=True)
class FDG(Term):
    """CFG with a scale of its own for low frequencies: pred = cond + sum_k (w_k - 1) band_k.

    band_k are the low and high frequencies of cond - null, see :func:`bands`; ``scale`` is w_high
    and ``low`` w_low. Low frequencies hold composition and colour, which a large scale narrows and
    saturates, high ones hold detail. With both scales 1 it is off; with both the same it is CFG.
    The split is linear, so it is the same in v, eps and x_0 at one x_t.

    Published: Stable Diffusion XL w_low = 5, w_high = 10.

    Source: section 4 and algorithm 2 of the paper, with two levels and all of the update kept.

    Raises:
        ValueError: a scale is not finite, or the model has no null condition.

    Example:
        >>> FDG(2.0, low=1.25).off, FDG(1.0, low=1.0).off
        (False, True)
    """

    key = "fdg"
    title = "FDG"
    does = "CFG with scales of their own for high and low frequencies"
    moves = "towards what was asked for, in coarse and fine structure apart"
    look = "how well it shows what was asked for"
    source = "Sadat et al. 2025"
    search = MappingProxyType({"low": (1.0, 3.0)})

    neutral: ClassVar[float] = 1.0
    strengths = ("scale", "low")
    from_null = True

    _: KW_ONLY
    low: float = 1.0
    """The scale of low frequencies; 1 leaves them as they are."""

    def contribution(self, ask: Question) -> Asking:
        """Return (w_low - 1) low + (w_high - 1) high of v_cond - v_null."""
        cond, null = yield ask.base, ask.required_null()
        low, high = bands(cond.v - null.v)
        return torch.as_tensor((self.low - 1) * low + (self.scale - 1) * high)
