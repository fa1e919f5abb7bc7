"""What rank 0 adds when every image is there: manifest, gallery and npz."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sag_dit.files import atomic
from sag_dit.output.folder import SampleFolder, read_png, read_views
from sag_dit.output.gallery import Entry
from sag_dit.sampling import Request


def write_manifest(
    folder: SampleFolder, requests: Sequence[Request], class_names: Sequence[str]
) -> Path:
    """Write ``manifest.jsonl``: a line per image with index, seed, class, file and sha256."""
    file = folder.path / "manifest.jsonl"
    with atomic(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for request in requests:
            image = folder.image(request.index)
            row = {
                "index": request.index,
                "seed": request.seed,
                "stream": request.stream,
                "label": request.label,
                "class": class_names[request.label],
                "file": image.relative_to(folder.path).as_posix(),
                "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def gallery_entries(
    folder: SampleFolder, requests: Sequence[Request], class_names: Sequence[str]
) -> list[Entry]:
    """Read the pairs that the gallery shows back from the folder."""
    return [
        Entry(
            index=request.index,
            seed=request.seed,
            label=class_names[request.label],
            guided=read_png(folder.image(request.index)),
            unguided=read_png(folder.twin(request.index)),
            views=read_views(folder.views(request.index)),
        )
        for request in requests
    ]


def write_npz(folder: SampleFolder, requests: Sequence[Request]) -> Path:
    """Write ``samples.npz`` in the ADM evaluator's format: arr_0, uint8 (n, h, w, 3).

    Grey images are repeated over three channels, since the evaluator reads RGB. The array is filled
    in place, one image at a time.
    """
    file = folder.path / "samples.npz"
    first = read_png(folder.image(requests[0].index))
    images = np.empty((len(requests), *first.shape[:2], 3), dtype=np.uint8)
    for row, request in enumerate(requests):
        images[row] = read_png(folder.image(request.index))
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, arr_0=images)
    return file


def log_gallery(
    logger: Any,
    entries: Sequence[Entry],
    settings: Mapping[str, Any],
) -> None:
    """Log the gallery to Weights & Biases: a row per pair with its scales and masks.

    Other loggers have no table of images, and get nothing here.
    """
    from lightning.pytorch.loggers import WandbLogger

    if not isinstance(logger, WandbLogger):
        return
    import wandb

    scales = {
        f"{name}_scale": term["scale"]
        for name, term in settings["guidance"].items()
        if "scale" in term
    }
    columns: list[str | int] = ["index", "class", "seed", "unguided", "guided", "masks", *scales]
    table = wandb.Table(columns=columns)
    for entry in entries:
        size = entry.guided.shape[:2]
        masks = {
            f"step {view.index + 1} of {view.count}": {
                "mask_data": _enlarged(view.mask.astype(np.uint8), size),
                "class_labels": {0: "kept", 1: "attended"},
            }
            for view in entry.views
        }
        table.add_data(
            entry.index,
            entry.label,
            entry.seed,
            wandb.Image(_picture(entry.unguided)),
            wandb.Image(_picture(entry.guided)),
            wandb.Image(_picture(entry.guided), masks=masks or None),
            *scales.values(),
        )
    logger.experiment.log({"gallery": table})


def _picture(image: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return image.squeeze(2) if image.shape[2] == 1 else image


def _enlarged(
    mask: np.ndarray[Any, np.dtype[np.uint8]], size: tuple[int, int]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Enlarge a mask over tokens to the image by nearest neighbour."""
    rows = np.arange(size[0]) * mask.shape[0] // size[0]
    columns = np.arange(size[1]) * mask.shape[1] // size[1]
    enlarged: np.ndarray[Any, np.dtype[np.uint8]] = mask[rows[:, None], columns]
    return enlarged
