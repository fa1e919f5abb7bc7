"""The model card of an export: where it comes from, what it is, how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sag_dit.checkpoints.model import Model
from sag_dit.codec import VAECodec
from sag_dit.models.family import families

SHOWN_CLASSES = 20


def model_card(
    model: Model,
    layout: str,
    has_autoencoder: bool,
    usage: Sequence[str],
    notes: Sequence[str],
    data: str | None,
    weights: str,
) -> str:
    """Return the text of README.md.

    ``has_autoencoder`` tells whether the export holds it; ``usage`` are the lines on how to use
    the export, ``notes`` what to mind; ``weights`` tells averaged ("ema") from raw ("raw") ones.
    """
    description = model.description
    config: dict[str, Any] = {key: description[key] for key in ("model", "process", "kind")}
    config["x_0_range"] = description["x_0_range"]
    names = list(model.class_names)
    shown = ", ".join(names[:SHOWN_CLASSES])
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN_CLASSES else ""
    network = model.class_conditional.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        f"# Model card: {model.name}",
        "",
        f"A class-conditional {families()[network.key].title}, exported by sag_dit.",
        "",
        "| | |",
        "|---|---|",
        f"| source | {model.name} |",
        f"| sha256 of the source's weights | `{model.sha256 or 'unknown: weights in memory'}` |",
        f"| weights | {'averaged (EMA)' if weights == 'ema' else 'raw, not averaged'}, float32 |",
        f"| layout | {layout} |",
        f"| parameters | {parameters:,} |",
        f"| input | {' x '.join(str(size) for size in model.denoiser.latent_shape)} |",
        f"| autoencoder | {_autoencoder(model, has_autoencoder)} |",
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
        *usage,
    ]
    if notes:
        lines += ["", "## Mind", "", *(f"- {note}." for note in notes)]
    return "\n".join(lines) + "\n"


def _cell(text: str | None) -> str:
    """Return a text that cannot break out of a table's cell."""
    return " ".join((text or "").replace("|", "\\|").split())


def _autoencoder(model: Model, there: bool) -> str:
    if not isinstance(model.codec, VAECodec):
        return "none: a pixel model"
    # What the folder holds, need not be looked for elsewhere.
    return "in vae/" if there else _cell(model.vae) or "not named by the source"
