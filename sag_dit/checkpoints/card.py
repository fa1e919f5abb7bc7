"""The model card of an export: where it comes from, what it is, how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sag_dit.checkpoints.model import Model
from sag_dit.codec import VAECodec

SHOWN_CLASSES = 20
NETWORKS = {"DiT": "diffusion transformer (DiT)", "UNet": "UNet (of ADM's and IDDPM's kind)"}


def model_card(
    model: Model, layout: str, notes: Sequence[str], data: str | None, weights: str
) -> str:
    """Return the text of README.md; ``weights`` tells averaged ("ema") from raw ("raw") ones."""
    description = model.description
    config: dict[str, Any] = {key: description[key] for key in ("model", "process", "kind")}
    config["x_0_range"] = description["x_0_range"]
    names = list(model.class_names)
    shown = ", ".join(names[:SHOWN_CLASSES])
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN_CLASSES else ""
    network = model.denoiser.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        f"# Model card: {model.name}",
        "",
        f"A class-conditional {NETWORKS[type(network).__name__]}, exported by sag_dit.",
        "",
        "| | |",
        "|---|---|",
        f"| source | {model.name} |",
        f"| sha256 of the source's weights | `{model.sha256 or 'unknown: weights in memory'}` |",
        f"| weights | {'averaged (EMA)' if weights == 'ema' else 'raw, not averaged'}, float32 |",
        f"| layout | {layout} |",
        f"| parameters | {parameters:,} |",
        f"| input | {' x '.join(str(size) for size in model.denoiser.latent_shape)} |",
        f"| autoencoder | {_autoencoder(model, layout)} |",
        f"| classes | {_cell(shown)}{more} |",
        "",
        "## Data",
        "",
        data or "Not known: the checkpoint does not say what it was trained on.",
        "",
        "The licence of the source's weights and data holds for this export too.",
        "",
        "## Config",
        "",
        "```json",
        json.dumps(config, indent=2),
        "```",
        "",
        "## Use",
        "",
        *_use(model, layout),
    ]
    if notes:
        lines += ["", "## Mind", "", *(f"- {note}." for note in notes)]
    return "\n".join(lines) + "\n"


def _cell(text: str | None) -> str:
    """Return a text that cannot break out of a table's cell."""
    return " ".join((text or "").replace("|", "\\|").split())


def _autoencoder(model: Model, layout: str) -> str:
    if not isinstance(model.codec, VAECodec):
        return "none: a pixel model"
    # What diffusers' folder holds, it need not look for elsewhere.
    return "in vae/" if layout == "diffusers" else _cell(model.vae) or "not named by the source"


def _use(model: Model, layout: str) -> list[str]:
    if layout == "dit":
        settings = model.description["model"]
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return [
            "In facebookresearch/DiT's own code:",
            "",
            "```python",
            "import torch",
            "from models import DiT",
            "",
            f"network = DiT({arguments})",
            'network.load_state_dict(torch.load("model.pt", weights_only=True))',
            "```",
            "",
            "In sag_dit, with config.json beside it: `sag_dit.load('model.pt')`.",
        ]
    if layout == "diffusers":
        guidance = "" if model.denoiser.num_classes == 1000 else ", guidance_scale=1"
        return [
            "```python",
            "from diffusers import DiTPipeline",
            "",
            'pipeline = DiTPipeline.from_pretrained("this folder")',
            f"images = pipeline(class_labels=[0]{guidance}).images",
            "```",
            "",
            "In sag_dit: `sag_dit.load('this folder')`.",
        ]
    return ["`sag_dit.load('this folder')`, or `python sample.py ckpt='this folder'`."]
