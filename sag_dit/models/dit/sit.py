"""SiT's weights (willisma/SiT), turned into those of our DiT on our flow.

SiT's network has a DiT's parameters. It is told t = 1 - u, where our u is 1 at noise, and its
velocity points from noise to image: x = t x_0 + (1 - t) eps, v_sit = x_0 - eps = -v. Both are
undone in the weights, once, so that nothing behind knows of them:

- Its time is seen through cosines and sines of t w. cos((1 - u) w) = cos w cos(u w) + sin w sin(u
  w), and likewise the sine, so the first linear layer behind them is rotated.
- The last linear layer is negated where the velocity is predicted. Its second half of the channels,
  which SiT's own code drops, is dropped.

REPA's SiT needs neither: its time and velocity are ours, see :func:`from_repa`.

Source: Ma et al. 2024, arXiv 2401.08740.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sag_dit.models.family import State

NAME = "SiT"
"""How names of SiT's models and official files begin."""
KINDS = {"velocity": "v", "noise": "eps", "score": "score"}
START = 0.999
"""Where noise and score models begin (their sample_eps): at pure noise they say nothing of v."""

PROJECTORS = "projectors."
"""What REPA trains beside the network and does not draw with."""
TIME = "t_embedder.mlp.0.weight"
LAST = "final_layer.linear"


class SiTVariant(NamedTuple):
    """How a SiT was trained: what it predicts, and whether by REPA's code.

    Example:
        >>> variant_of(Path("SiT-XL-2-256x256.pt"), {}, {})
        SiTVariant(prediction='velocity', repa=False)
    """

    prediction: str
    repa: bool


def variant_of(path: Path, state: State, args: Mapping[str, Any]) -> SiTVariant | None:
    """Return how a SiT was trained; None for no SiT.

    A SiT is known by the arguments of its training script, by its file's name, or by REPA's
    projectors.

    Raises:
        ValueError: it was trained on another path than the straight line.
    """
    model = args.get("model")
    if isinstance(model, str) and not model.startswith(NAME):
        return None
    # REPA's script names paths and predictions in its own way.
    line, prediction = args.get("path_type"), args.get("prediction")
    repa = any(name.startswith(PROJECTORS) for name in state) or "proj_coeff" in args
    repa = repa or (prediction == "v" and line in ("linear", "cosine"))
    if not repa and not (isinstance(model, str) or path.name.startswith(NAME)):
        return None
    straight, kinds = ("linear", {"v": "v"}) if repa else ("Linear", KINDS)
    found = SiTVariant(str(prediction or next(iter(kinds))), repa)
    if line not in (None, straight) or found.prediction not in kinds:
        raise ValueError(
            f"{path}: a SiT with path_type={line!r} and prediction={found.prediction!r}; expected "
            f"path_type={straight!r}, the straight line, and one of {', '.join(kinds)}"
        )
    return found


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


def from_sit(state: State, variant: SiTVariant) -> tuple[State, dict[str, Any]]:
    """Return the weights of our DiT, and the process and kind that go with them.

    Weights that are missing are left to strict loading to report.
    """
    process: dict[str, Any] = {"time_scale": 1.0, "shift": 1.0}
    if variant.repa:
        return from_repa(state), {"process": process, "kind": "v"}
    renamed = dict(state)
    if TIME in state:
        renamed[TIME] = reversed_time(state[TIME])
    if f"{LAST}.weight" in state and "x_embedder.proj.weight" in state:
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        sign = -1 if variant.prediction == "velocity" else 1
        for kind in ("weight", "bias"):
            if f"{LAST}.{kind}" in state:
                by_pixel = state[f"{LAST}.{kind}"].unflatten(0, (patch * patch, -1))
                renamed[f"{LAST}.{kind}"] = sign * by_pixel[:, :channels].flatten(0, 1)
    if variant.prediction != "velocity":
        process["start"] = START
    return renamed, {"process": process, "kind": KINDS[variant.prediction]}


def from_repa(state: State) -> State:
    """Return REPA's weights without its projectors; its time and velocity are ours.

    Its code trains on x_t = (1 - t) x_0 + t eps and predicts eps - x_0. Older files call the blocks
    behind the projectors ``decoder_blocks`` and count them from 0.

    Source: Yu et al. 2024 (arXiv 2410.06940), sihyun-yu/REPA.
    """
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    renamed = {}
    for name, tensor in state.items():
        if older := re.fullmatch(r"decoder_blocks\.(\d{1,9})\.(.+)", name):
            name = f"blocks.{blocks + int(older[1])}.{older[2]}"
        if not name.startswith(PROJECTORS):
            renamed[name] = tensor
    return renamed
