"""load_classifier: from a name or a path to a classifier that is ready to guide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sag_dit.checkpoints import files, formats, infer_unet, keys, published, zoo
from sag_dit.checkpoints.loading import fill

if TYPE_CHECKING:
    from sag_dit.models.classifier import Classifier


def load_classifier(classifier: str | Path) -> Classifier:
    """Load one of ADM's classifiers of noisy images, by its published name or a file's path.

    It is a module (x_t, t) -> logits, in eval mode, float32, on the CPU, its weights frozen.

    Raises:
        ValueError: it is not found, damaged, or no classifier.
    """
    from sag_dit.models.classifier import Classifier

    found = zoo.locate_classifier(classifier)
    state = keys.unwrapped(files.tensors(files.read_torch(found.path), found.path))
    if not published.is_published(state):
        raise ValueError(
            f"{found.path}: not a classifier of openai/guided-diffusion; found "
            f"{', '.join(list(state)[:3])}, ..."
        )
    converted = infer_unet.convert(
        state, found.path, formats.config_beside(found.path), classifier=True
    )
    try:
        with torch.device("meta"):
            network = Classifier(**converted.model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{found.path}: {error}") from None
    fill(network, converted.state, found.path)
    return network.eval().requires_grad_(False)
