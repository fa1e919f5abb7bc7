"""ViewRecorder: keeps what self-attention guidance saw at several steps, for the gallery."""

from __future__ import annotations

from sag_dit.denoiser import Denoiser
from sag_dit.guidance import SAG
from sag_dit.guidance.sag import attention_mask
from sag_dit.output.gallery import StepView
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Settings

SHOWN = 6
"""Steps shown of each image, evenly spread over the run."""


class ViewRecorder:
    """A watch over one batch that keeps its SAG term's saliency at evenly spread steps."""

    def __init__(self, settings: Settings, denoiser: Denoiser) -> None:
        terms = (term for term in settings.guidance if isinstance(term, SAG) and not term.off)
        self._sag = next(terms, None)
        self._layer = None if self._sag is None else denoiser.layer(self._sag.layer)
        self._kept: list[SampleStep] = []

    def __call__(self, step: SampleStep) -> None:
        """Keep this step if it is wanted and SAG acted on it."""
        last = step.step.count - 1
        wanted = step.step.index in {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
        if wanted and self._layer and self._layer.name in step.prediction.attention:
            self._kept.append(step)

    def views(self, row: int) -> tuple[StepView, ...]:
        """Return what was seen of one image of the batch; nothing without SAG."""
        if self._sag is None or self._layer is None:
            return ()
        views = []
        for kept in self._kept:
            saliency = kept.prediction.attention[self._layer.name][row : row + 1]
            mask = attention_mask(saliency, self._layer.grid, self._sag.threshold)
            views.append(
                StepView(
                    index=kept.step.index,
                    count=kept.step.count,
                    t=float(kept.step.level.t),
                    saliency=saliency.unflatten(1, self._layer.grid)[0].cpu().numpy(),
                    mask=mask[0].cpu().numpy(),
                    threshold=self._sag.threshold,
                )
            )
        return tuple(views)
