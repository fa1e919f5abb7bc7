"""Sliding-window guidance (Adaloglou et al., BMVC 2025, arXiv 2411.10257)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch

from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, BranchTerm, Question


@dataclass(frozen=True)
class SWG(BranchTerm):
    """pred + s M (pred - the mean of its overlapping crops); s = 0 is off.

    ``crops`` x ``crops`` windows, each a share ``crop`` of both sides, are asked as images of their
    own, so that none sees the whole; a DiT's positions are resized to them, as the authors do.
    M is 1, or with ``masked`` (M-SWG) 1 where windows overlap and else 0. A window costs its share
    of a pass: four of 5/8 cost 1.56.

    A weaker model beside it is :class:`Autoguidance` beside it, as in the paper.

    Published: four crops of 20 x 20 of 32 x 32 latents; EDM2-S at 512 pixels, masked, s = 0.2 for
    FID and 1.1 for FD-DINOv2.

    Source: the authors' code, HHU-MMBS/swg_bmvc2025_official, edm2/diffusion/models.py. Where
    windows do not fit evenly it leaves a rim without any; here they are spread over all of it.

    Raises:
        ValueError: the windows do not cover the image, or each covers all of it, or the network
            takes images of one size only.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SWG(0.2, masked=True)])
    """

    key = "swg"
    title = "SWG"
    does = "away from what crops look like by themselves"
    moves = "away from one drawn piece by piece"
    look = "how its parts fit together"
    source = "Adaloglou et al. 2025"
    variants = MappingProxyType({"M-SWG": "SWG(masked=True)"})
    needs = frozenset({"sizes"})
    search = MappingProxyType({"masked": [False, True]})

    _: KW_ONLY
    crop: float = 0.625
    """Side of a window, as a share of the image's; rounded up to what the network takes."""
    crops: int = 2
    """Windows along each side, spread evenly."""
    masked: bool = False
    """Guide only where windows overlap (M-SWG)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 2:
            raise ValueError(f"crops={self.crops}: expected 2 or more along each side")
        if not 1 / self.crops <= self.crop < 1:
            raise ValueError(
                f"crop={self.crop}: expected less than 1, and at least 1 / crops = "
                f"{1 / self.crops:g}, so that the windows cover the image"
            )

    def check(self, model: Denoiser) -> None:
        """Refuse a network of one size, and windows of which one covers a side, or none overlap."""
        super().check(model)
        if model.size_multiple is None:
            raise ValueError(
                f"swg_scale={self.scale}: {type(model.network).__name__} takes images of one size "
                f"only, not crops of them; set swg_scale=0"
            )
        _, *sides = model.latent_shape
        for side, windows in zip(sides, self.windows(model), strict=True):
            width = windows[0].stop - windows[0].start
            if width == side:
                raise ValueError(
                    f"crop={self.crop} of {side} is {width} in multiples of "
                    f"{model.size_multiple}, the whole side; expected a smaller crop"
                )
            if self.masked and width * self.crops == side:
                raise ValueError(f"crop={self.crop}: the windows do not overlap; masked needs it")

    def windows(self, model: Denoiser) -> tuple[list[slice], list[slice]]:
        """Return where the windows lie, downwards and across."""
        multiple = model.size_multiple or 1

        def along(side: int) -> list[slice]:
            # Rounded first: 0.7 of 10 is a little more than 7.
            width = multiple * math.ceil(round(side * self.crop / multiple, 6))
            starts = (i * (side - width) // (self.crops - 1) for i in range(self.crops))
            return [slice(start, start + width) for start in starts]

        return along(model.latent_shape[1]), along(model.latent_shape[2])

    def contribution(self, ask: Question) -> Asking:
        """Return s M (v - v_crops)."""
        branch = ask.branch(self.branch)
        down, across = self.windows(branch.model)
        places = [(..., rows, columns) for rows in down for columns in across]
        good, *parts = yield branch, *(branch.at(branch.x_t[place]) for place in places)
        # The mean of what the windows say of each place, all of it at the same x_t.
        total, count = torch.zeros_like(good.v), torch.zeros_like(good.v[:1, :1])
        for place, part in zip(places, parts, strict=True):
            total[place] += part.v
            count[place] += 1
        difference = good.v - total / count
        return self.scale * (difference * (count > 1) if self.masked else difference)
