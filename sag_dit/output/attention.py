"""Showing attention: the maps of an image as arrays, and drawn on a sheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sag_dit.files import atomic
from sag_dit.traces import AttentionView

Pixels = NDArray[np.uint8]


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
