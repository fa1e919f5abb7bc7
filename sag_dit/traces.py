"""The attention of images while they are drawn, kept step by step to be shown.

A :class:`Recorder` watches one batch. For each image it gives a :class:`Trace`: the saliency and
the mask that self-attention guidance used, and the attention of the layers that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from sag_dit.attention import AttentionLayer, CaptureKind
from sag_dit.denoiser import Denoiser
from sag_dit.guidance import SAG, Term
from sag_dit.guidance.guided import base_key
from sag_dit.guidance.sag import attention_mask
from sag_dit.process import Step
from sag_dit.sampler import SampleStep

SHOWN = 6
"""Steps at which a trace shows what guidance saw, evenly spread over the run."""

Captures = Callable[[Step], Sequence[tuple[str, CaptureKind]]]
"""Says of which layers to read attention at a step, in addition to what guidance reads."""


@dataclass(frozen=True)
class Maps:
    """Which attention to keep.

    Attributes:
        layers: names of self-attention layers, as guidance takes them, or ``("all",)``.
        steps: how many steps, evenly spread from the first to the last, or their numbers.
        query: a place (down, across) in the image, each in [0, 1): the attention of its token to
            all tokens is kept. None keeps no such map.
        limit: guidance whose threshold or quantile makes the mask: it is set where the saliency is
            larger.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Maps(layers=("all",), steps=3).indices(51)
        [0, 25, 50]
    """

    layers: tuple[str, ...] = ("auto",)
    steps: int | tuple[int, ...] = 6
    query: tuple[float, float] | None = (0.5, 0.5)
    limit: SAG = field(default_factory=SAG)

    def __post_init__(self) -> None:
        steps = self.steps
        if steps == () or (isinstance(steps, int) and steps < 1):
            raise ValueError(
                f"steps={steps}: expected how many steps to show, 1 or more, or their numbers"
            )
        if not self.layers:
            raise ValueError("layers=[]: expected names of self-attention layers, or all")
        query = self.query
        if query is not None and not all(0 <= at < 1 for at in query):
            raise ValueError(
                f"query={query}: expected a place in the image, (down, across), each from 0 to "
                f"less than 1, or null"
            )

    def layers_of(self, denoiser: Denoiser) -> list[AttentionLayer]:
        """Return the layers to keep.

        Raises:
            ValueError: no layer of that name.
        """
        if self.layers == ("all",):
            return list(denoiser.layers.values())
        return list({(found := denoiser.layer(name)).name: found for name in self.layers}.values())

    def indices(self, count: int) -> list[int]:
        """Return the numbers of the steps to keep, for a run of ``count`` steps.

        These are a run's evaluations, of which some samplers make two in a step of their grid.

        Raises:
            ValueError: the run has no step of a number that was asked for.
        """
        if isinstance(self.steps, int):
            places = np.linspace(0, count - 1, min(self.steps, count))
            return sorted({round(place) for place in places.tolist()})
        beyond = [index for index in self.steps if not 0 <= index < count]
        if beyond:
            raise ValueError(f"step {beyond[0]} does not exist: expected 0 to {count - 1}")
        return sorted(set(self.steps))


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer of one image at the chosen steps; at each step the saliency has mean 1.

    Example:
        >>> seen = np.ones((1, 4, 4), np.float32)
        >>> LayerView("blocks.3.attn", saliency=seen, mask=seen > 1, query_map=None).mask.shape
        (1, 4, 4)
    """

    name: str
    saliency: Float32[NDArray[np.float32], "s h w"] = field(repr=False)
    mask: Bool[NDArray[np.bool_], "s h w"] = field(repr=False)
    query_map: Float32[NDArray[np.float32], "s h w"] | None = field(repr=False)
    """What the query attends to, as a mean over heads; sums to 1 at each step."""


@dataclass(frozen=True, eq=False)
class AttentionView:
    """The attention kept of one image: numbers and times of the steps, and each layer's arrays.

    Example::

        drawn = draw_batch(model, requests, settings, traced=[0], maps=Maps(layers=("all",)))
        for layer in drawn.traces[0].maps.layers:
            print(layer.name, layer.saliency.max())
    """

    steps: tuple[int, ...]
    times: tuple[float, ...]
    layers: tuple[LayerView, ...]
    query: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class StepView:
    """What self-attention guidance saw at one sampler step.

    Attributes:
        index: the number of the step, from 0.
        count: how many steps the run has.
        t: the time of the step's noise level.
        saliency: (h, w) float32, the attention that each token receives, with mean 1.
        mask: (h, w) bool, the tokens that guidance degrades.
        threshold: the saliency that these tokens exceed.

    Raises:
        ValueError: the arrays have other shapes, or the saliency is not finite.

    Example:
        >>> seen = np.ones((4, 4), np.float32)
        >>> StepView(0, count=50, t=999.0, saliency=seen, mask=seen > 1, threshold=1.0).mask.shape
        (4, 4)
    """

    index: int
    count: int
    t: float
    saliency: NDArray[np.float32] = field(repr=False)
    mask: NDArray[np.bool_] = field(repr=False)
    threshold: float

    def __post_init__(self) -> None:
        if self.saliency.ndim != 2 or self.saliency.shape != self.mask.shape:
            raise ValueError(
                f"saliency {self.saliency.shape} and mask {self.mask.shape} of step {self.index} "
                "must be one (h, w) token grid: reshape both to the layer's grid"
            )
        if not np.isfinite(self.saliency).all():
            raise ValueError(
                f"the saliency of step {self.index} holds nan or inf, expected finite numbers: "
                "look for the first step whose prediction is not finite"
            )


@dataclass(frozen=True, eq=False)
class Trace:
    """The attention that was kept while one image was drawn.

    Attributes:
        steps: what self-attention guidance saw, at up to ``SHOWN`` steps; empty without guidance.
        maps: the attention of the layers that were asked for; None if none were.

    Example::

        drawn = draw_batch(model, requests, settings, traced=[0])
        print([step.mask.mean() for step in drawn.traces[0].steps])
    """

    steps: tuple[StepView, ...] = ()
    maps: AttentionView | None = None


class Recorder:
    """Watches one batch and keeps the attention that its traces show.

    The sampler asks before each step which attention to read (:meth:`captures`), and hands over the
    step when it is done. How many steps there are, each step tells: samplers with two evaluations
    in a step count both. Maps show the attention under the condition that was asked for, even where
    guidance degrades another branch.

    Example::

        recorder = Recorder(model.denoiser, guidance=[SAG(0.5)])
        images = draw(model, requests, settings, recorder, recorder.captures)
        recorder.trace(0).steps[-1].mask
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Sequence[Term] = (),
        maps: Maps | None = None,
    ) -> None:
        self._denoiser, self._maps = denoiser, maps
        terms = (term for term in guidance if isinstance(term, SAG) and not term.off)
        # The other masks are not made of what attention says, so there is nothing to see of them.
        self._sag = next((term for term in terms if term.mask == "attention"), None)
        self._layers = maps.layers_of(denoiser) if maps else []
        self._kept: list[SampleStep] = []

    def captures(self, step: Step) -> Sequence[tuple[str, CaptureKind]]:
        """Return the attention to read at a step, in addition to what guidance reads."""
        if self._maps is None or not self._mapped(step):
            return ()
        kinds: tuple[CaptureKind, ...] = ("saliency", "map") if self._maps.query else ("saliency",)
        return [(layer.name, kind) for layer in self._layers for kind in kinds]

    def __call__(self, step: SampleStep) -> None:
        """Keep a step if a trace will show it."""
        if self._saw(step) or self._mapped(step.step):
            self._kept.append(step)

    def _mapped(self, step: Step) -> bool:
        """Whether maps show this step."""
        return self._maps is not None and step.index in self._maps.indices(step.count)

    def _saw(self, step: SampleStep) -> bool:
        """Whether a trace shows this step, and guidance acted at it."""
        last = step.step.count - 1
        shown = step.step.index in {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
        return shown and self._sag is not None and self._sag.active(step.step)

    def trace(self, row: int) -> Trace:
        """Return the trace of one image, by its row in the batch."""
        return Trace(self._steps(row), None if self._maps is None else self._view(self._maps, row))

    def _steps(self, row: int) -> tuple[StepView, ...]:
        views = []
        for kept in filter(self._saw, self._kept):
            assert self._sag is not None
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

    def _view(self, maps: Maps, row: int) -> AttentionView:
        mapped = [kept for kept in self._kept if self._mapped(kept.step)]
        return AttentionView(
            steps=tuple(kept.step.index for kept in mapped),
            times=tuple(float(kept.step.level.t) for kept in mapped),
            layers=tuple(_layer_view(maps, layer, mapped, row) for layer in self._layers),
            query=maps.query,
        )


def _layer_view(
    maps: Maps, layer: AttentionLayer, steps: Sequence[SampleStep], row: int
) -> LayerView:
    attention = [kept.prediction.attention for kept in steps]
    saliency = torch.stack([read[base_key(layer.name, "saliency")][row] for read in attention])
    seen = None
    if maps.query is not None:
        height, width = layer.grid
        down, across = maps.query
        token = int(down * height) * width + int(across * width)
        key = base_key(layer.name, "map")
        seen = torch.stack([read[key][row].mean(0)[token] for read in attention])
    on_grid = saliency.unflatten(1, layer.grid)
    return LayerView(
        layer.name,
        on_grid.cpu().numpy(),
        attention_mask(saliency, layer.grid, maps.limit.limit(on_grid)).cpu().numpy(),
        None if seen is None else seen.unflatten(1, layer.grid).cpu().numpy(),
    )
