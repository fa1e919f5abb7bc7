"""``batch_size=auto``: as many images at once as fit, found once and kept by the folder."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sag_dit.cli.app import quiet_lightning
from sag_dit.cli.composing import make
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.keys import Guides
from sag_dit.output.claim import recorded

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.sampling import Settings

MOST = 256
"""Images that are tried at once: more make no device faster."""
EVERY, PATIENCE = 0.2, 600.0
"""Seconds between two looks at the folder, and after which a rank gives up."""


def decided_batch_size(
    config: Guides, folder: Path, model: Model, how: Settings, num_images: int
) -> int:
    """Return the batch size of a folder: what it was begun with, else the largest that fits.

    The first rank tries, and writes it down with the folder's settings; the others read it there.

    Raises:
        ValueError: not even one image fits, or the first rank has written nothing.
    """
    known = _recorded(folder)
    if known is None and not is_first_rank():
        until = time.monotonic() + PATIENCE
        while known is None and time.monotonic() < until:
            time.sleep(EVERY)
            known = _recorded(folder)
        if known is None:
            raise ValueError(
                f"batch_size=auto: the first rank has written none to {folder} in "
                f"{PATIENCE:.0f} s; expected a disk that all ranks see, or a number"
            )
    if known is None:
        known = _tried(config, model, how, num_images)
        told = "as many as fit"
    else:
        told = f"as {folder} was begun with"
    if is_first_rank():
        print(f"batch_size: {known}, {told}")
    return known


def _recorded(folder: Path) -> int | None:
    found = recorded(folder).get("settings", {}).get("batch_size")
    return found if isinstance(found, int) and found > 0 else None


def _tried(config: Guides, model: Model, how: Settings, num_images: int) -> int:
    """Try on this rank's device, in the arithmetic in which the Trainer will draw."""
    quiet_lightning()
    import torch
    from lightning.pytorch import Trainer

    from sag_dit.training.fitting import largest_batch
    from sag_dit.training.module import DiffusionModule, at_least_float32

    make_trainer = partial(make, config.trainer, "trainer", Trainer, logger=False)
    trainer = make_trainer(enable_progress_bar=False, enable_model_summary=False)
    device, plugin = trainer.strategy.root_device, trainer.precision_plugin
    # The memory of a CPU is not what bounds a batch there; the model's own is as fast.
    most = min(MOST, max(num_images, 1) * 2 - 1, config.max_rows or MOST)
    if device.type == "cpu":
        most = min(most, model.batch_size)
    module = DiffusionModule(model, settings=how)
    torch.set_float32_matmul_precision(config.matmul)
    try:
        plugin.convert_module(module).to(device)
        model.codec.to(device)
        with plugin.predict_step_context(), at_least_float32():
            return largest_batch(model, how, most)
    finally:
        module.to("cpu")
        model.codec.to("cpu")
