"""Small classifiers of the bundled data sets, whose features stand where Inception's do elsewhere.

With a few hundred real images a covariance of more than some 32 dimensions is mostly noise, so
they pool 32 features. ``python -m benchmarks.classifiers`` trains them; the card beside the weights
says how well they recognise held-out images and what their distances notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sag_dit.evaluation.features import FeatureExtractor, Features

FEATURES = 32
SPATIAL_CHANNELS = 2
"""Of the last 4 x 4 map; so spatial features are 32 too."""


@dataclass(frozen=True)
class Kind:
    """Shape of one classifier: its images (c, size, size), channels per stage, and classes.

    Example:
        >>> KINDS["digits"].classes
        10
    """

    channels: int
    size: int
    widths: tuple[int, ...]
    classes: int


KINDS = {
    "digits": Kind(channels=1, size=8, widths=(64,), classes=10),
    "patches": Kind(channels=3, size=32, widths=(24, 40, 56), classes=14),
    "emoji": Kind(channels=3, size=64, widths=(24, 40, 56, 72), classes=31),
}


def convolutions(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Return stages of two 3x3 convolutions, of which the second halves the image, then a last one.

    (b, channels, 4 2^s, 4 2^s) -> (b, 32, 4, 4) for s stages. A SiLU follows every convolution.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, FEATURES, 3, padding=1), nn.SiLU())


class SmallClassifier(FeatureExtractor):
    """Convolutions, their mean over the image, and a linear layer to the classes.

    ``pool`` is the mean (b, 32) of the last map, ``spatial`` (b, 32) its first two channels at all
    of its 4 x 4 places, as ADM's sFID takes the first seven of a map of Inception's, ``logits`` the
    classes' with their bias. ``name`` is one of ``KINDS``.

    Example::

        features = bundled_classifier("digits")(images)
        labels = features.logits.argmax(dim=1)
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in KINDS:
            raise ValueError(f"{name!r} is no classifier: expected one of {', '.join(KINDS)}")
        self.name = name
        self.kind = KINDS[name]
        self.protocol: Mapping[str, Any] = {"resize": "none", "range": [-1, 1], "weights": None}
        self.convolutions = convolutions(self.kind.channels, self.kind.widths)
        self.classes = nn.Linear(FEATURES, self.kind.classes)

    @classmethod
    def by_name(cls) -> Mapping[str, Callable[[], FeatureExtractor]]:
        """Return what loads each of the bundled classifiers."""
        return {name: partial(bundled_classifier, name) for name in KINDS}

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of images with values in 0..255.

        Raises:
            ValueError: the images are not uint8 or not of the size that it was trained on.
        """
        shape = (self.kind.channels, self.kind.size, self.kind.size)
        if self.kind.channels == 1 and bool((images == images[:, :1]).all()):
            images = images[:, :1]  # grey on three channels, as in an npz for ADM's evaluator
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"{images.dtype} images {tuple(images.shape[1:])}: the features `{self.name}` "
                f"expect uint8 images {shape}; choose others, such as features=inception"
            )
        maps = self.convolutions(images.to(self.classes.weight.dtype) / 127.5 - 1)
        pool = maps.mean((2, 3))
        return Features(pool, maps[:, :SPATIAL_CHANNELS].flatten(1), self.classes(pool))


def bundled_classifier(name: str) -> SmallClassifier:
    """Load one of the classifiers of ``KINDS``; its weights come with the package.

    Raises:
        ValueError: there is no classifier of this name.
    """
    classifier = SmallClassifier(name)
    weights = files(__package__).joinpath("weights", f"{name}.safetensors").read_bytes()
    classifier.load_state_dict(safetensors.torch.load(weights))
    digest = hashlib.sha256(weights).hexdigest()
    classifier.protocol = {**classifier.protocol, "weights": digest}
    return classifier.eval().requires_grad_(False)
