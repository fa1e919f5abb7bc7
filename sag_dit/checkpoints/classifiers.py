"""load_classifier: from a name or a path to a classifier that is ready to guide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sag_dit.checkpoints import files, formats, zoo
from sag_dit.checkpoints.loading import fill
from sag_dit.models.family import WeightsFile
from sag_dit.models.unet.adapter import CLASSIFIER_SOURCE, read_classifier

if TYPE_CHECKING:
    from sag_dit.models.unet.classifier import Classifier


def load_classifier(classifier: str | Path) -> Classifier:
    """Load one of ADM's classifiers of noisy images, by its published name or a file's path.

    It is a module (x_t, t) -> logits, in eval mode, float32, on the CPU, its weights frozen.

    Raises:
        ValueError: it is not found, damaged, or no classifier.
    """
    path = zoo.locate_classifier(classifier).path
    state = files.unwrapped(files.tensors(files.read_torch(path), path))
    state, network = read_classifier(WeightsFile(path, state, formats.config_beside(path)))
    fill(network, state, path, CLASSIFIER_SOURCE)
    return network.eval().requires_grad_(False)
