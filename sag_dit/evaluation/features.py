"""What a network sees in images, in full float32: the vectors that every metric here compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What one network says of b images.

    ``pool`` (b, d) is what most metrics compare, ``spatial`` (b, s) is for sFID, and the softmax of
    ``logits`` (b, k) for the Inception Score. What a network lacks is None.

    Example:
        >>> import torch
        >>> Features(pool=torch.zeros(2, 32)).logits is None
        True
    """

    pool: Float[Tensor, "b d"]
    spatial: Float[Tensor, "b s"] | None = None
    logits: Float[Tensor, "b k"] | None = None


class FeatureExtractor(nn.Module, ABC):
    """A network that turns uint8 images into ``Features``, its own preprocessing included.

    ``name`` is short and stands beside every number. ``protocol`` holds, as plain JSON values, all
    that changes a number: size and kind of the resize, antialiasing, the range of pixel values, the
    sha256 of the weights. Two extractors with equal name and protocol give equal features.

    Example::

        class Colours(FeatureExtractor):
            name, protocol = "colours", {"range": [0, 255]}

            def forward(self, images: Tensor) -> Features:
                return Features(images.float().mean(dim=(2, 3)))
    """

    name: str
    protocol: Mapping[str, Any]

    @classmethod
    def by_name(cls) -> Mapping[str, Callable[[], FeatureExtractor]]:
        """Return what makes networks of this class that find their weights, by name."""
        return {cls.name: cls}

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of images with values in 0..255.

        Raises:
            ValueError: the images are not uint8, or have a number of channels it cannot read.
        """


BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of uint8 images of one or three channels.

    Raises:
        ValueError: what was given, and what was expected.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images {images.dtype} {tuple(images.shape)}: expected uint8 (b, 1 or 3, h, w)"
        )


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the tensors, whatever a trainer has set.

    cuDNN rounds the inputs of a float32 convolution to ten bits unless told otherwise, which
    changes features by a thousandth.
    """
    before = [backend.fp32_precision for backend in BACKENDS]
    try:
        for backend in BACKENDS:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(BACKENDS, before, strict=True):
            backend.fp32_precision = precision


@cache
def feature_networks() -> Mapping[str, Callable[[], FeatureExtractor]]:
    """Return what makes each network of this package, by name; they are found by their files."""
    package = __name__.rpartition(".")[0]
    for file in sorted(Path(__file__).parent.glob("*.py")):
        import_module(f"{package}.{file.stem}")
    own = [
        each for each in FeatureExtractor.__subclasses__() if each.__module__.startswith(package)
    ]
    return dict(sorted(pair for each in own for pair in each.by_name().items()))
