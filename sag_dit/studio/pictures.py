"""What was drawn, as HTML: every picture stands in the page itself, so that no file is served."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sag_dit.api import Samples
from sag_dit.output.gallery import data_uri, heat_colours

Look = Literal["picture", "saliency", "mask"]
TOP = 2.0
"""The saliency at the bright end of the colours; its mean is 1."""


@dataclass
class Drawing:
    """One run: what was seen of it step by step, and what to say of it.

    Example::

        drawing = Drawing("SAG 0.5, layer 3")
        drawing.frames.append(out)
        stage(drawing)
    """

    words: str
    frames: list[Samples] = field(default_factory=list)

    @property
    def last(self) -> Samples:
        """The newest frame."""
        return self.frames[-1]

    def at(self, step: int | None) -> Samples:
        """Return the last frame of at most ``step`` steps, the first one if there is none."""
        seen = [frame for frame in self.frames if step is None or frame.step <= step]
        return seen[-1] if seen else self.frames[0]


def picture(image: Tensor) -> str:
    """Return an image (c, h, w) as the address of an ``img``."""
    return data_uri(image.permute(1, 2, 0).contiguous().numpy())


def small(images: Tensor) -> str:
    """Return the class of images that are enlarged pixel by pixel; larger ones are smoothed."""
    return " small" if max(images.shape[-2:]) <= 32 else ""


def heat(saliency: NDArray[np.float32]) -> str:
    """Return the saliency of tokens (h, w) in colours."""
    return data_uri(heat_colours(saliency / TOP))


def veil(mask: NDArray[np.bool_]) -> str:
    """Return a mask of tokens (h, w), white where it is set and black where it is not."""
    return data_uri(np.where(mask, 255, 0).astype(np.uint8)[:, :, None])


def stage(
    drawing: Drawing, look: Look = "picture", step: int | None = None, kept: Drawing | None = None
) -> str:
    """Return the pictures of a run beside their twins, at one of its steps.

    ``kept`` is what the swap key shows in the place of the guided pictures: another run, or the
    twins where there is none.
    """
    frame = drawing.at(step)
    other = None if kept is None else kept.last.tensor
    if other is not None and other.shape[1:] != frame.tensor.shape[1:]:
        other = None
    assert frame.twins_tensor is not None
    # A pair for each image; behind the guided one lies what the swap key brings to the front.
    pairs = []
    for place, label in enumerate(frame.labels):
        twin, guided = frame.twins_tensor[place], frame.tensor[place]
        behind = twin if other is None or place >= len(other) else other[place]
        name = "A, kept" if behind is not twin else "unguided"
        pairs.append(
            '<div class="pair">'
            f"{_shown_cell('unguided', [('own', picture(twin))], label)}"
            + _shown_cell(
                "guided",
                [("own", picture(guided)), ("other", picture(behind)), *_seen(frame, place, look)],
                label,
                other=name,
            )
            + "</div>"
        )
    done = frame.step if step is not None else drawing.last.step
    running = drawing.last.step < drawing.last.steps
    share = 100 * drawing.last.step / drawing.last.steps
    height, width = frame.tensor.shape[-2:]
    return (
        f'<div class="stage count-{len(pairs)}{small(frame.tensor)}" '
        f'style="--shape: {width} / {height}" data-step="{frame.step}" '
        f'data-running="{str(running).lower()}">'
        f'<div class="told"><span class="words">{html.escape(drawing.words)}</span>'
        f'<span class="at">step {done} of {frame.steps}</span></div>'
        f'<div class="progress"><i style="width:{share:.0f}%"></i></div>'
        f'<div class="pairs">{"".join(pairs)}</div></div>'
    )


def _seen(frame: Samples, place: int, look: Look) -> list[tuple[str, str]]:
    """Return the attention of one picture at the frame's step, as a layer over it."""
    if look == "picture" or not frame.maps:
        return []
    view = frame.maps[place]
    past = [index for index, step in enumerate(view.steps) if step < frame.step]
    if not past:
        return []
    layer = view.layers[0]
    if look == "mask":
        return [("veil", veil(layer.mask[past[-1]]))]
    return [("heat", heat(layer.saliency[past[-1]]))]


def _shown_cell(
    kind: str, layers: Sequence[tuple[str, str]], label: str, other: str | None = None
) -> str:
    told = html.escape(f"{kind}: {label}")
    shown = "".join(
        f'<img class="{name}" src="{uri}" alt="{told if name == "own" else ""}" draggable="false">'
        for name, uri in layers
    )
    swapped = "" if other is None else f'<b class="other">{html.escape(other)}</b>'
    return (
        f'<figure class="{kind}"><div class="shot">{shown}</div>'
        f'<figcaption><b class="own">{kind}</b>{swapped} '
        f"<span>{html.escape(label)}</span></figcaption></figure>"
    )


def about(model: str) -> str:
    """Return what a model's ``repr`` says of it."""
    return f"<p>{html.escape(model.partition('(')[2].removesuffix(')'))}</p>"


def problem(error: str) -> str:
    """Return a sentence that explains what cannot work."""
    return f'<p class="problem" role="alert">{html.escape(error)}</p>' if error else ""
