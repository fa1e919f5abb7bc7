"""``studio.py``: a page on this machine on which sliders draw."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sag_dit.cli.app import launch
from sag_dit.cli.composing import compose
from sag_dit.cli.keys import Studio
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.presets import with_presets

ALONE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "*",
    "no_proxy": "*",
}
"""What keeps libraries from asking other machines; they read it when they are imported."""


def presets() -> dict[str, Mapping[str, Any]]:
    """Return what sample.py draws each bundled model with; under ``""``, any other one."""
    from sag_dit.catalogue import entries

    found = {name: with_presets("sample", [f"ckpt={name}"]) for name in entries("bundled")}
    return {name: to_dict(compose("sample", keys)) for name, keys in {**found, "": []}.items()}


def run_studio(config: Studio) -> None:
    """Serve the page until it is told to stop.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    os.environ.update(ALONE)
    if find_spec("gradio") is None:
        raise ValueError(
            'the studio needs gradio, which is not installed: pip install -e ".[studio]"'
        )
    import torch

    from sag_dit.studio.app import Begin
    from sag_dit.studio.library import Library
    from sag_dit.studio.serving import served

    folders = [config.folder] if isinstance(config.folder, str) else config.folder
    device = str(config.device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    library = Library([Path(each) for each in folders], device, (config.ckpt,))
    begin = Begin(config.ckpt, config.prompt or "", config.steps, config.images, presets())
    library.load(config.ckpt, begin.prompt if library.text(config.ckpt) else None)
    with served(library, begin, config.host, config.port, config.upload) as address:
        print(f"studio: {address} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)


main = partial(launch, "studio", run_studio)
"""Run ``studio.py``, with the arguments of the command line unless others are given."""
