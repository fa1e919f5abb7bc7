"""Inputs and weights of the golden files, as pure functions of a name.

Nothing random is stored: every number is element i of the stream that a name starts, made with
integer arithmetic and one exact conversion, so it is the same on every machine and release.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = Path(__file__).with_name("goldens.safetensors")

# Part of a parameter's name -> what its values are multiplied by; the first match counts.
FACTORS = {
    "pos_embed": 0.1,
    "x_embedder": 0.1,
    "t_embedder.mlp.0.weight": 0.3,
    "final_layer.adaLN_modulation": 1.0,
    "adaLN_modulation": 0.5,
}


def fixed(name: str, *shape: int, std: float = 1.0) -> Tensor:
    """The tensor that `name` stands for: uniform, zero mean, standard deviation `std`.

    Element i is the i-th output of the SplitMix64 generator seeded with the first eight bytes of
    sha256(name), scaled in float64 and rounded once to float32.

    Args:
        name: what the tensor is; equal names give equal streams.
        shape: its shape.
        std: its standard deviation.

    Returns:
        Float32 tensor of that shape, values within sqrt(3) std of zero.
    """
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], dtype="<u8")[0]
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        z = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((2.0 * unit - 1.0) * math.sqrt(3.0) * std).float().reshape(shape)


def fill(network: nn.Module) -> None:
    """Give every parameter its fixed value, no path left at zero.

    Matrices keep unit variance from input to output (std = fan_in^-1/2), biases have std 0.2 and
    the label table std 1, so that time, label, gates and final layer all show in the output. The
    positions stay the implementation's own. The factors below condition the comparison: small
    tokens let the epsilon of a LayerNorm show, and a quiet time embedding does not magnify the
    sines of large float32 angles, which differ between processors.

    Args:
        network: a DiT of any implementation with the published parameter names.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            factor = next((x for part, x in FACTORS.items() if part in name), 1.0)
            if name == "pos_embed":
                parameter.mul_(factor)
                continue
            if name == "y_embedder.embedding_table.weight":
                std = 1.0
            elif parameter.ndim > 1:
                std = parameter[0].numel() ** -0.5
            else:
                std = 0.2
            parameter.copy_(fixed(f"weights.{name}", *parameter.shape, std=factor * std))


@dataclass(frozen=True)
class Size:
    """Constructor arguments of one small DiT, under the published names."""

    input_size: int
    in_channels: int
    learn_sigma: bool
    patch_size: int = 2
    hidden_size: int = 48
    depth: int = 3
    num_heads: int = 4
    num_classes: int = 10

    @property
    def null(self) -> int:
        """The label row that stands for no label."""
        return self.num_classes


LEARNED = Size(input_size=8, in_channels=4, learn_sigma=True)
PLAIN = Size(input_size=8, in_channels=4, learn_sigma=False)
# Three channels and an 8x8 token grid: what the authors' masking is written for.
PIXEL = Size(input_size=16, in_channels=3, learn_sigma=True)
SIZES = {"learned": LEARNED, "plain": PLAIN, "pixel": PIXEL}


def latent(name: str, size: Size, count: int) -> Tensor:
    """Fixed input of `count` rows for a network of this size, B C H W."""
    return fixed(name, count, size.in_channels, size.input_size, size.input_size)


# --- forward -------------------------------------------------------------------------------------
FORWARD_T = (0.0, 1.0, 250.0, 500.0, 999.0)
FORWARD_T_REAL = (0.25, 17.5, 250.75, 500.5, 998.75)
FORWARD_Y = (0, 3, 9, 10, 7)  # 10 is the null label

CFG_SCALES = (1.5, 4.0)
CFG_T = (999, 500, 3)  # one evaluation of two rows each
CFG_Y = (2, 8)

# --- schedules -----------------------------------------------------------------------------------
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
STEP_COUNTS = (250, 50, 10)


def indices(steps: int) -> tuple[int, ...]:
    """The respaced indices whose posterior is compared: both ends, the second, the middle."""
    return (0, 1, steps // 2, steps - 1)


POSTERIOR_Y = (4, 10)

# --- trajectories --------------------------------------------------------------------------------
RUN_STEPS = 10
RUN_Y = (1, 6)
RUN_KEPT = (0, 1, 4, 8, 9)  # steps whose result is stored, the noisiest first


@dataclass(frozen=True)
class Run:
    """One recorded trajectory: which network, sampler and options."""

    size: str = "learned"
    sampler: str = "ddim"
    eta: float = 0.0
    variance: str = "learned"
    clamp: bool = False
    cfg_scale: float = 1.0
    schedule: str = "linear"


RUNS = {
    "ddim": Run(),
    "ddim_cosine_clamp": Run(schedule="cosine", clamp=True),
    "ddim_eta": Run(eta=0.5, clamp=True),
    "ddim_cfg": Run(cfg_scale=1.5),
    "ddpm": Run(sampler="ddpm"),
    "ddpm_cfg": Run(sampler="ddpm", cfg_scale=4.0),
    "ddpm_small": Run(size="plain", sampler="ddpm", variance="fixed_small", clamp=True),
    "ddpm_large": Run(size="plain", sampler="ddpm", variance="fixed_large", clamp=True),
}


def recorded_noise(run: str) -> Callable[[int, tuple[int, ...]], Tensor]:
    """The noise of a trajectory: step number, counted from the noisiest -> tensor."""
    return lambda step, shape: fixed(f"noise.{run}.{step}", *shape)


# --- SAG -----------------------------------------------------------------------------------------
SAG_GRID = (8, 8)


@dataclass(frozen=True)
class Degrade:
    """One call of the authors' masking: x_0, eps and attention in, mask and degraded x_t out."""

    height: int
    width: int
    index: int
    blur_sigma: float
    steps: int = 1000
    heads: int = 4

    def x_0(self, name: str) -> Tensor:
        """The predicted clean image, B C H W."""
        return fixed(f"degrade.{name}.x_0", 2, 3, self.height, self.width)

    def eps(self, name: str) -> Tensor:
        """The predicted noise, B C H W."""
        return fixed(f"degrade.{name}.eps", 2, 3, self.height, self.width)

    def attention(self, name: str) -> Tensor:
        """Rows of softmax weights, (B heads) N N, uneven enough to mask about half the tokens."""
        tokens = SAG_GRID[0] * SAG_GRID[1]
        shared = fixed(f"degrade.{name}.keys", 2 * self.heads, 1, tokens)
        own = fixed(f"degrade.{name}.scores", 2 * self.heads, tokens, tokens)
        return torch.softmax((shared + own).double(), dim=-1).float()


DEGRADE = {
    # 31 is the published kernel; 16 pixels are the fewest that its reflected border allows.
    "adm": Degrade(height=32, width=32, index=700, blur_sigma=9.0),
    "narrow": Degrade(height=16, width=24, index=120, blur_sigma=3.0),
    "clean_end": Degrade(height=16, width=16, index=0, blur_sigma=9.0, steps=250),
}


@dataclass(frozen=True)
class Guided:
    """One self-attention-guided ancestral run of the pixel DiT with the authors' sampler."""

    scale: float
    clamp: bool
    blur_sigma: float
    layer: int = 1
    steps: int = RUN_STEPS
    labels: tuple[int, ...] = field(default=(5, 0))


GUIDED = {
    "clamped": Guided(scale=0.8, clamp=True, blur_sigma=9.0),
    "free": Guided(scale=0.3, clamp=False, blur_sigma=3.0, layer=0),
}
