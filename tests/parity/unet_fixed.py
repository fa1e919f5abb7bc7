"""Small networks of guided diffusion, improved diffusion and SiT, and what is asked of them.

Their weights are pure functions of the published names, as in `fixed.py`; names and shapes lie in
`unet_layouts.json`, which the originals wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fixed import fixed

GOLDENS = Path(__file__).with_name("unet_goldens.safetensors")
LAYOUTS = Path(__file__).with_name("unet_layouts.json")

# Part of a published name -> what its values are multiplied by: a quiet time embedding does not
# magnify the sines of large angles, which differ between processors.
FACTORS = {"time_embed.0.weight": 0.3, "pos_embed": 0.3, "t_embedder.mlp.0.weight": 0.3}


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The fixed weights of one published parameter: norms near 1, matrices keep the variance."""
    factor = FACTORS.get(name, 1.0)
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + fixed(f"unet.{name}", *shape, std=0.2)
    if name in ("label_emb.weight", "y_embedder.embedding_table.weight"):
        return fixed(f"unet.{name}", *shape)
    std = 0.2 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
    return fixed(f"unet.{name}", *shape, std=factor * std)


@lru_cache
def _state_of(net: str) -> dict[str, Tensor]:
    shapes = json.loads(LAYOUTS.read_text())[net]
    return {name: values(name, tuple(shape)) for name, shape in shapes.items()}


def state_of(net: str) -> dict[str, Tensor]:
    """The published state dict of a network."""
    return dict(_state_of(net))


@dataclass(frozen=True)
class Net:
    """One network: the original's constructor arguments, and the config beside our copy of it."""

    code: str
    flags: dict[str, Any]
    stated: dict[str, Any]
    process: dict[str, Any] = field(default_factory=dict)
    new_order: bool = False
    size: int = 16
    classes: int = 0

    @property
    def beside(self) -> dict[str, Any]:
        """The config that lies beside the file, with what the weights do not tell."""
        return {
            "model": {"input_size": self.size, **self.stated},
            "process": self.process,
            "new_attention_order": self.new_order,
        }


LINEAR = {"schedule": "linear", "num_timesteps": 1000}
COSINE_4000 = {"schedule": "cosine", "num_timesteps": 4000}


def _guided(**flags: Any) -> dict[str, Any]:
    usual = {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 2,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    return {**usual, **flags}


def _improved(**flags: Any) -> dict[str, Any]:
    left_out = ("image_size", "resblock_updown")
    return {name: value for name, value in _guided(**flags).items() if name not in left_out}


NETS = {
    "adm": Net(
        "guided",
        _guided(num_head_channels=16, num_classes=10),
        {"num_head_channels": 16},
        LINEAR,
        classes=10,
    ),
    "new_order": Net(
        "guided",
        _guided(num_head_channels=32, use_new_attention_order=True, num_res_blocks=1),
        {"num_head_channels": 32},
        LINEAR,
        new_order=True,
    ),
    # As ADM-512: a first level narrower than the time embedding is made for, and heads by number.
    "narrow": Net(
        "guided",
        _guided(
            model_channels=64,
            channel_mult=(0.5, 1, 1),
            attention_resolutions=(2, 4),
            num_res_blocks=1,
            num_heads=4,
        ),
        {"num_heads": 4},
        LINEAR,
    ),
    "iddpm": Net(
        "improved",
        _improved(num_heads=4, num_res_blocks=1),
        {"num_heads": 4, "time_scale": 0.25},
        COSINE_4000,
    ),
    "plain": Net(
        "improved",
        _improved(num_heads=1, use_scale_shift_norm=False, out_channels=3, num_res_blocks=1),
        {"num_heads": 1},
        LINEAR,
    ),
}
CLASSIFIER = Net(
    "guided",
    {
        **{k: v for k, v in _guided(num_head_channels=16).items() if k != "out_channels"},
        "out_channels": 10,
        "pool": "attention",
    },
    {"num_head_channels": 16},
)

# Respaced indices of 250 steps of `adm`, guided by the classifier without clamping and with.
CLASSIFIED = (20, 120)
CLASSIFIER_SCALE = 2.0

SIT_SIZE = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
    "learn_sigma": True,
}


def image(name: str, net: Net, count: int) -> Tensor:
    """Fixed input of `count` rows, B C H W."""
    return fixed(f"unet.{name}", count, 3, net.size, net.size)


def thin(x: Tensor) -> Tensor:
    """Every second row and column, staggered: what is stored of an image."""
    return x[..., ::2, 1::2].contiguous()


FORWARD_T = (3, 999)
LABELS = (7, 2)

# --- single steps, by network: the number of steps and the respaced indices ---------------------
STEPS = {"adm": (250, (0, 1, 249)), "iddpm": (10, (0, 5, 9)), "plain": (25, (0, 12))}

# --- trajectories --------------------------------------------------------------------------------
KEPT = (0, 2, 4)
RUN_STEPS = 5
RUNS = {"ddim": "adm", "ancestral": "iddpm"}

# --- SAG: the layer under the authors' name, and their reading of its heads ----------------------


GUIDED_STEPS = 25


@dataclass(frozen=True)
class Guided:
    """One guided step of the authors' fork."""

    net: str
    layer: str
    index: int
    scale: float = 0.8
    blur_sigma: float = 9.0
    heads: int | None = None
    """A number of heads that is not the layer's own."""


GUIDED = {
    "output": Guided("adm", "output_blocks.2", 18),
    "middle": Guided("adm", "middle_block", 7, scale=0.3, blur_sigma=3.0),
    # As the commands for 256 pixels: heads of 32 channels read as 4 heads of 16.
    "misread": Guided("wide", "output_blocks.2", 12, heads=4),
}
NETS["wide"] = Net(
    "guided",
    _guided(num_head_channels=32),
    {"num_head_channels": 32},
    LINEAR,
)

# --- SiT -----------------------------------------------------------------------------------------
SIT_T = (0.05, 0.5, 0.93)
SIT_LABELS = (1, 9, 10)  # 10 is the null label
SIT_STEPS = 6
SIT_CFG = 1.5
PREDICTIONS = ("velocity", "noise", "score")
FORMS = {
    "sigma": "sigma",
    "constant": "constant",
    "decreasing": "decreasing",
    "inccreasing-decreasing": "increasing_decreasing",
}


def sit_noise(form: str, step: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of one step of a SiT's SDE."""
    return fixed(f"sit.noise.{form}.{step}", *shape)
