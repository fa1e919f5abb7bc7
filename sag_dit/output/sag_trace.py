"""ViewRecorder: keeps what self-attention guidance saw at several steps, for the gallery."""

from __future__ import annotations

from sag_dit.denoiser import Denoiser
from sag_dit.guidance import SAG
from sag_dit.output.gallery import StepView
from sag_dit.sampler import SampleStep
from sag_dit.sampling import Settings

SHOWN = 6
"""Steps shown of each image, evenly spread over the run."""


class ViewRecorder:
    """A watch over one batch that keeps its SAG term's saliency at evenly spread steps."""

    def __init__(self, settings: Settings, denoiser: Denoiser) -> None:
        terms = (term for term in settings.guidance if isinstance(term, SAG) and not term.off)
        # The other masks are not made of what attention says, so there is nothing to see of them.
        self._sag = next((term for term in terms if term.mask == "attention"), None)
        self._denoiser = denoiser
        self._kept: list[SampleStep] = []

    def __call__(self, step: SampleStep) -> None:
        """Keep this step if it is wanted and SAG acted on it."""
        last = step.step.count - 1
        wanted = step.step.index in {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
        if wanted and self._sag is not None and self._sag.active(step.step):
            self._kept.append(step)

    def views(self, row: int) -> tuple[StepView, ...]:
        """Return what was seen of one image of the batch; nothing without SAG."""
        if self._sag is None:
            return ()
        views = []
        for kept in self._kept:
            attention = kept.prediction.attention
            read = {
                key: attention[key][row : row + 1] for key in self._sag.readings(self._denoiser)
            }
            saliency, mask = self._sag.attended(read, self._denoiser)
            views.append(
                StepView(
                    index=kept.step.index,
                    count=kept.step.count,
                    t=float(kept.step.level.t),
                    saliency=saliency[0].cpu().numpy(),
                    mask=mask[0].cpu().numpy(),
                    threshold=float(self._sag.limit(saliency)),
                )
            )
        return tuple(views)
