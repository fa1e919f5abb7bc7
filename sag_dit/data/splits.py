"""Held-out images by name, to compare samples with: ``digits:report``, ``patches:tune``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sag_dit.data.digits import digits
from sag_dit.data.emoji import emoji
from sag_dit.data.patches import patches
from sag_dit.tensors import Images, Labels


def _half_of_digits(odd: bool) -> tuple[Images, Labels]:
    """Return every other held-out digit of each class, in their order."""
    images, labels = digits("held_out")
    place_in_class = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    chosen = place_in_class % 2 == (0 if odd else 1)
    return images[chosen], labels[chosen]


SPLITS: dict[str, Callable[[], tuple[Images, Labels]]] = {
    "digits:train": lambda: digits("train"),
    "digits:held_out": lambda: digits("held_out"),
    "digits:tune": lambda: _half_of_digits(odd=False),
    "digits:report": lambda: _half_of_digits(odd=True),
    "emoji:train": lambda: emoji("train"),
    "emoji:held_out": lambda: emoji("held_out"),
    "emoji:tune": lambda: emoji("tune"),
    "emoji:report": lambda: emoji("report"),
    "patches:held_out": lambda: patches("held_out"),
    "patches:tune": lambda: patches("tune"),
    "patches:report": lambda: patches("report"),
}


def split(name: str) -> tuple[Images, Labels]:
    """Return images (b, c, h, w), uint8, and labels of a split that ``SPLITS`` names.

    ``held_out`` holds all images that no bundled model was trained on. Its halves share no image,
    and those of the patches no pixel. Settings are chosen with ``tune``; ``report`` tells how good
    they are.

    Raises:
        ValueError: there is no such split.
    """
    if name not in SPLITS:
        raise ValueError(f"{name!r} is no split: expected one of {', '.join(SPLITS)}")
    return SPLITS[name]()
