"""Seeing attention: saliency, mask and one query's map of chosen layers and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from sag_dit.attention import AttentionLayer, CaptureKind
from sag_dit.denoiser import Denoiser
from sag_dit.files import atomic
from sag_dit.guidance import SAG
from sag_dit.guidance.guided import base_key
from sag_dit.guidance.masks import attention_mask
from sag_dit.process import Step
from sag_dit.sampler import SampleStep

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Maps:
    """What to keep of attention.

    ``layers``: names as guidance takes them, or ``("all",)``. ``steps``: so many, evenly spread
    over the run with both ends, or the numbers of the steps. ``query``: the place (down, across)
    in the image, in [0, 1), whose token's attention to all others is kept, None for none.
    ``limit``: guidance whose threshold or quantile saliency exceeds where the mask is set.

    Raises:
        ValueError: a value outside its range.
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
        """Return the layers meant.

        Raises:
            ValueError: no layer of that name.
        """
        if self.layers == ("all",):
            return list(denoiser.layers.values())
        return list({(found := denoiser.layer(name)).name: found for name in self.layers}.values())

    def indices(self, count: int) -> list[int]:
        """Return the steps meant of a run of ``count``.

        Raises:
            ValueError: a number that the run does not reach.
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
    """One layer at the chosen steps, of one image: saliency has mean 1 at each step."""

    name: str
    saliency: Float32[NDArray[np.float32], "s h w"]
    mask: Bool[NDArray[np.bool_], "s h w"]
    query_map: Float32[NDArray[np.float32], "s h w"] | None
    """What the chosen query attends to, mean over heads; sums to 1 at each step."""


@dataclass(frozen=True, eq=False)
class AttentionView:
    """What was kept of one image: the steps by number and time, and each layer's arrays."""

    steps: tuple[int, ...]
    times: tuple[float, ...]
    layers: tuple[LayerView, ...]
    query: tuple[float, float] | None


class AttentionRecorder:
    """Tells a run what to read (:meth:`captures`) and, watching it, keeps it.

    What is read is the given condition's, whichever branch guidance degrades.
    """

    def __init__(self, maps: Maps, denoiser: Denoiser, count: int) -> None:
        self.maps = maps
        self.layers = maps.layers_of(denoiser)
        self._wanted = set(maps.indices(count))
        self._kept: list[SampleStep] = []

    def captures(self, step: Step) -> Sequence[tuple[str, CaptureKind]]:
        """Return what is to be read at a step."""
        if step.index not in self._wanted:
            return ()
        kinds: tuple[CaptureKind, ...] = ("saliency", "map") if self.maps.query else ("saliency",)
        return [(layer.name, kind) for layer in self.layers for kind in kinds]

    def __call__(self, step: SampleStep) -> None:
        """Keep a step that is wanted."""
        if step.step.index in self._wanted:
            self._kept.append(step)

    def view(self, row: int) -> AttentionView:
        """Return what was kept of one image of the batch."""
        return AttentionView(
            steps=tuple(kept.step.index for kept in self._kept),
            times=tuple(float(kept.step.level.t) for kept in self._kept),
            layers=tuple(self._layer_view(layer, row) for layer in self.layers),
            query=self.maps.query,
        )

    def _layer_view(self, layer: AttentionLayer, row: int) -> LayerView:
        attention = [kept.prediction.attention for kept in self._kept]
        saliency = torch.stack([read[base_key(layer.name, "saliency")][row] for read in attention])
        seen = None
        if self.maps.query is not None:
            height, width = layer.grid
            down, across = self.maps.query
            token = int(down * height) * width + int(across * width)
            key = base_key(layer.name, "map")
            seen = torch.stack([read[key][row].mean(0)[token] for read in attention])
        on_grid = saliency.unflatten(1, layer.grid)
        return LayerView(
            layer.name,
            on_grid.cpu().numpy(),
            attention_mask(saliency, layer.grid, self.maps.limit.limit(on_grid)).cpu().numpy(),
            None if seen is None else seen.unflatten(1, layer.grid).cpu().numpy(),
        )


def write_arrays(file: Path, view: AttentionView) -> None:
    """Keep a view as an npz: ``steps``, ``times``, and LAYER/saliency, /mask, /query_map."""
    arrays: dict[str, NDArray[np.generic]] = {
        "steps": np.array(view.steps),
        "times": np.array(view.times),
    }
    for layer in view.layers:
        arrays[f"{layer.name}/saliency"] = layer.saliency
        arrays[f"{layer.name}/mask"] = layer.mask
        if layer.query_map is not None:
            arrays[f"{layer.name}/query_map"] = layer.query_map
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def write_sheet(
    file: Path, view: AttentionView, image: Pixels, notes: Mapping[str, str] | None = None
) -> None:
    """Draw a view: a row of saliency for each layer, and one of the query's map where it was kept.

    The mask's border is drawn on the saliency. Colour runs from 0 to 3 times the average attention
    in every cell, so that layers and steps compare; ``image`` (h, w, 1 or 3) closes each row.
    """
    from matplotlib.figure import Figure

    rows = [
        (layer, kind)
        for layer in view.layers
        for kind in ("saliency", "query")
        if kind == "saliency" or layer.query_map is not None
    ]
    columns = len(view.steps) + 1
    figure = Figure(figsize=(1.9 + 1.1 * columns, 0.8 + 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (layer, kind) in enumerate(rows):
        for column in range(columns):
            cell = axes[row, column]
            cell.set_xticks([])
            cell.set_yticks([])
            if column == len(view.steps):
                cell.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
                continue
            if kind == "saliency":
                shown = cell.imshow(layer.saliency[column], cmap="viridis", vmin=0, vmax=3)
                mask = layer.mask[column]
                if mask.any() and not mask.all():
                    # Along the tokens' borders, so that no token looks half masked.
                    sharp = np.kron(mask.astype(float), np.ones((8, 8)))
                    height, width = mask.shape
                    cell.contour(
                        np.linspace(-0.5, width - 0.5, 8 * width),
                        np.linspace(-0.5, height - 0.5, 8 * height),
                        sharp,
                        [0.5],
                        colors="white",
                        linewidths=0.8,
                    )
            else:
                assert layer.query_map is not None and view.query is not None
                seen = layer.query_map[column]
                cell.imshow(seen * seen.size, cmap="viridis", vmin=0, vmax=3)
                height, width = seen.shape
                at = int(view.query[1] * width), int(view.query[0] * height)
                cell.plot(*at, "o", mfc="none", mec="red", ms=6)
            if row == 0:
                cell.set_title(
                    f"step {view.steps[column]}\nt = {view.times[column]:.4g}", fontsize=8
                )
        label = layer.name if kind == "saliency" else "what the circled\ntoken attends to"
        note = (notes or {}).get(layer.name, "") if kind == "saliency" else ""
        axes[row, 0].set_ylabel(
            f"{label}\n{note}".strip(), fontsize=8, rotation=0, ha="right", va="center"
        )
    axes[0, -1].set_title("image", fontsize=8)
    bar = figure.colorbar(
        shown, ax=axes, shrink=min(1.0, 3 / len(rows)), aspect=12, pad=0.01, extend="max"
    )
    bar.set_label("attention, 1 = average", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
