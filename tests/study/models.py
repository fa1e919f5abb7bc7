"""Small models of 8 x 8 digits with random weights, and cells of a study that was never drawn."""

from __future__ import annotations

from dataclasses import replace

from sag_dit.checkpoints import Model
from sag_dit.codec import IdentityCodec
from sag_dit.data.digits import CLASS_NAMES
from sag_dit.denoiser import ClassConditional
from sag_dit.process import Flow
from sag_dit.study.field import Row
from tests.small import dit


def small_model(seed: int = 0) -> Model:
    """A flow of 8 x 8 grey digits, of 4 x 4 tokens."""
    network = dit(seed, in_channels=1, hidden_size=16, depth=2, num_heads=2, learn_sigma=False)
    denoiser = ClassConditional(network, Flow(), kind="v")
    return Model(denoiser, IdentityCodec(), f"small-{seed}", f"sha-{seed}", {}, CLASS_NAMES)


NUMBERS = {
    # FD of training 0, 1 and 2, recall, passes.
    "unguided": ((20.0, 30.0, 26.0), 0.60, 20.0),
    "CFG": ((15.0, 24.9, 21.1), 0.55, 40.0),
    "SAG": ((18.0, 28.5, 23.0), 0.62, 40.0),
    "PAG": ((20.5, 29.0, 26.5), 0.58, 40.0),
    "history": ((19.0, 29.1, 24.9), 0.60, 20.0),
}


def cells(family: str = "small", trainings: int = 3, seeds: int = 2) -> list[Row]:
    """Cells of a finished study of five rows, and one method that could not be."""
    rows = []
    for name, (distances, recall, passes) in NUMBERS.items():
        for training, distance in enumerate(distances[:trainings]):
            row = Row(family, training, 0, "report", name, "method", 0.5, f"{name} 0.5", "DDIM", 20)
            for seed in range(seeds):
                metrics = {"fid": distance + 0.1 * seed, "recall": recall + 0.01 * training}
                own = replace(row, seed=seed, passes=passes, images=300, metrics=metrics)
                rows.append(replace(own, identity=f"{name}-{training}-{seed}"))
                if name not in ("unguided", "CFG"):
                    metrics = {"fid": distance - 1 + 0.1 * seed, "recall": recall}
                    rows.append(replace(own, role="along", passes=40.0, metrics=metrics))
            if name != "unguided":
                told = {"along": 1.2, "share": 0.4, "size": 0.03, "cfg_size": 1.5}
                rows.append(replace(row, seed=2000, part="effect", effect=told))
    rows.append(Row(family, 0, 0, "report", "TPG", "method", missing="this UNet has no blocks"))
    return rows
