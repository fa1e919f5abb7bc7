"""Best-of-N: draw an image from several noises, and keep the one that scores best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.guidance import Cost
from sag_dit.sampling import Found, Request, Settings, Watch, draw, part_of
from sag_dit.search.verifier import CLASSIFIER, Verified, Verifier, check_count


@dataclass(frozen=True)
class BestOf(Verified):
    """Random search: draw each image ``num`` times, and keep the one with the highest score.

    Number 0 is the image without a search, so that no choice scores lower than it. Of equal scores
    the first counts. Any sampler and any guidance will do.

    Source: Ma et al. 2025, arXiv 2501.09732, section 3.2 (random search).

    Raises:
        ValueError: ``num`` is below 2.

    Example::

        sag_dit.sample(model, [3, 7], search=BestOf(8))
        brightest = BestOf(8, lambda images, labels: images.mean((1, 2, 3)))
    """

    key = "best_of"

    num: int = 4
    """How often each image is drawn."""
    verifier: Verifier | str = CLASSIFIER
    """What scores images: classifier, or a function or module (images, condition) -> scores."""

    def __post_init__(self) -> None:
        check_count("num", self.num, least=2)

    def __str__(self) -> str:
        return f"the best of {self.num} by {self.told_verifier}"

    def cost(self, alone: Cost) -> Cost:
        """Return ``num`` times the passes; each drawing is scored once."""
        return replace(alone, particles=self.num, scored=self.num)

    def find(
        self, model: Model, requests: Sequence[Request], settings: Settings, watch: Watch | None
    ) -> tuple[UInt8[Tensor, "b c h w"], list[Found]]:
        """Draw the batch ``num`` times; see :meth:`Search.find`."""
        judge = self.judge(model, settings)
        best, found = torch.empty(0), list[Found]()
        for number in range(self.num):
            asked = [request.particle(number) for request in requests]
            images = draw(model, asked, settings, part_of(watch, number, self.num))
            seen = [
                Found(score, each.lineage)
                for score, each in zip(judge(images, asked).tolist(), asked, strict=True)
            ]
            if number == 0:
                best, found = images, seen
            for row, each in enumerate(seen):
                if each.score > found[row].score:
                    best[row], found[row] = images[row], each
        return best, found
