"""SiT's weights (willisma/SiT), turned into those of our DiT on our flow.

SiT's network has a DiT's parameters. It is told t = 1 - u, where our u is 1 at noise, and its
velocity points from noise to image: x = t x_0 + (1 - t) eps, v_sit = x_0 - eps = -v. Both are
undone in the weights, once, so that nothing behind knows of them:

- Its time is seen through cosines and sines of t w. cos((1 - u) w) = cos w cos(u w) + sin w sin(u
  w), and likewise the sine, so the first linear layer behind them is rotated.
- The last linear layer is negated where the velocity is predicted. Its second half of the channels,
  which SiT's own code drops, is dropped.

Source: Ma et al. 2024, arXiv 2401.08740.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sag_dit.models.family import State

NAME = "SiT"
"""How names of SiT's models and official files begin."""
KINDS = {"velocity": "v", "noise": "eps", "score": "score"}
START = 0.999
"""Where noise and score models begin (their sample_eps): at pure noise they say nothing of v."""

TIME = "t_embedder.mlp.0.weight"
LAST = "final_layer.linear"


def prediction_of(path: Path, args: Any) -> str | None:
    """Return what a SiT predicts, ``velocity``, ``noise`` or ``score``; None for no SiT.

    A SiT is known by the arguments of its training script, or by its file's name.

    Raises:
        ValueError: it was trained on another path than the straight line.
    """
    stated = args if isinstance(args, Namespace) else Namespace()
    model = getattr(stated, "model", None)
    if not (path.name.startswith(NAME) if model is None else str(model).startswith(NAME)):
        return None
    line = getattr(stated, "path_type", "Linear")
    prediction = str(getattr(stated, "prediction", "velocity"))
    if line != "Linear" or prediction not in KINDS:
        raise ValueError(
            f"{path}: a SiT with path_type={line!r} and prediction={prediction!r}; expected "
            f"path_type='Linear', the straight line, and one of {', '.join(KINDS)}"
        )
    return prediction


def reversed_time(weight: Tensor) -> Tensor:
    """Return the time embedding's first weights (d, f) such that 1 - u may be told as u.

    With frequencies w and weights (C, S) of cosines and sines: C' = C cos w + S sin w, S' = C sin w
    - S cos w.
    """
    half = weight.shape[1] // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = weight.double().split(half, dim=1)
    of_cosine = cosines * w.cos() + sines * w.sin()
    of_sine = cosines * w.sin() - sines * w.cos()
    return torch.cat([of_cosine, of_sine], dim=1).float()


def from_sit(state: State, prediction: str) -> tuple[State, dict[str, Any]]:
    """Return the weights of our DiT, and the process and kind that go with them.

    Weights that are missing are left to strict loading to report.
    """
    renamed = dict(state)
    if TIME in state:
        renamed[TIME] = reversed_time(state[TIME])
    if f"{LAST}.weight" in state and "x_embedder.proj.weight" in state:
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        sign = -1 if prediction == "velocity" else 1
        for kind in ("weight", "bias"):
            if f"{LAST}.{kind}" in state:
                by_pixel = state[f"{LAST}.{kind}"].unflatten(0, (patch * patch, -1))
                renamed[f"{LAST}.{kind}"] = sign * by_pixel[:, :channels].flatten(0, 1)
    process = {"time_scale": 1.0, "shift": 1.0}
    if prediction != "velocity":
        process["start"] = START
    return renamed, {"process": process, "kind": KINDS[prediction]}
