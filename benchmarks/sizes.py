"""What is measured: the published sizes, those for a CPU, or tiny ones that show that it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import randomise
from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.codec import IdentityCodec, VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, Term
from sag_dit.models import SIZES, DiT
from sag_dit.process import DDPM
from sag_dit.training.peaks import peak_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    network: dict[str, int]
    peer: str
    """The peers' name of a network of that size."""
    latent: int
    large_latent: int
    batches: tuple[int, ...]
    batch: int
    """The batch of everything that is measured at one batch only."""
    large_batch: int
    rounds: int
    steps: int
    training: dict[str, tuple[dict[str, int], int]]
    """Sizes that are trained, each with its batch."""
    training_rounds: int
    product: int
    vae: dict[str, Any]
    arithmetics: tuple[str, ...] = ("TF32", "bf16 autocast")
    """What passes are compared with peers in; runs are in the first."""
    run_rounds: int = 3
    """How often a whole run is timed beside a peer's."""
    unet: dict[str, Any] | None = None
    """Stable Diffusion's network, None: it is left out."""


SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TINY_VAE: dict[str, Any] = {
    **SD_VAE,
    "block_out_channels": (4, 4, 4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
UNET: dict[str, Any] = {
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 64,
}
"""Of Stable Diffusion's form, much smaller."""
TINY = {"hidden_size": 48, "depth": 2, "num_heads": 2, "patch_size": 2}

FULL_SCALE = Scale(
    network=SIZES["DiT-XL/2"],
    peer="DiT-XL/2",
    latent=32,
    large_latent=64,
    batches=(8, 32, 64),
    batch=32,
    large_batch=8,
    rounds=8,
    steps=20,
    training={"XL/2": (SIZES["DiT-XL/2"], 32), "B/2": (SIZES["DiT-B/2"], 128)},
    training_rounds=10,
    product=8192,
    vae=SD_VAE,
)
TINY_SCALE = Scale(
    network=TINY,
    peer="DiT-S/8",
    latent=8,
    large_latent=16,
    batches=(1, 2),
    batch=2,
    large_batch=1,
    rounds=2,
    steps=2,
    training={"tiny/2": (TINY, 2)},
    training_rounds=2,
    product=64,
    vae=TINY_VAE,
    unet={**UNET, "block_out_channels": (8, 8, 8), "norm_num_groups": 4},
)
CPU_SCALE = Scale(
    network=SIZES["DiT-S/2"],
    peer="DiT-S/2",
    latent=32,
    large_latent=64,
    batches=(1, 4),
    batch=4,
    large_batch=1,
    rounds=12,
    steps=10,
    training={"S/2": (SIZES["DiT-S/2"], 4)},
    training_rounds=12,
    product=1024,
    vae={**TINY_VAE, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8},
    arithmetics=("fp32",),
    run_rounds=12,
    unet=UNET,
)
"""What two cores measure beside the peers in half an hour."""


def network(size: dict[str, int], latent: int) -> DiT:
    """Return a DiT of 1,000 classes with random weights, none of them zero."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = DiT(latent, num_classes=1000, **size)  # type: ignore[arg-type]
        randomise(made)
    return made.eval()


def autoencoder(scale: Scale) -> Any:
    """Return an autoencoder of Stable Diffusion's size with random weights."""
    from diffusers import AutoencoderKL

    with torch.device(DEVICE):
        return AutoencoderKL(latent_channels=4, sample_size=256, **scale.vae).eval()


def model(made: DiT, vae: Any) -> Model:
    """Return the model that ``load`` would make of these weights; without ``vae``, of latents."""
    codec = IdentityCodec() if vae is None else VAECodec(vae, sha256="random")
    return from_denoiser(ClassConditional(made, DDPM()).eval(), "random", codec=codec)


GUIDANCE: dict[str, tuple[Term, ...]] = {
    "unguided": (),
    "CFG": (CFG(1.5),),
    "SAG": (SAG(1.0),),
    "CFG + SAG": (CFG(1.5), SAG(1.0)),
}


def inputs(latent: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, times and labels of one batch."""
    x = torch.randn(batch, 4, latent, latent, device=DEVICE, dtype=dtype)
    t = torch.full((batch,), 500.0, device=DEVICE)
    return x, t, torch.arange(batch, device=DEVICE) % 1000


ARITHMETICS = ("fp32", "TF32", "bf16", "bf16 + compile")


@contextmanager
def arithmetic(name: str) -> Iterator[torch.dtype]:
    """Set how products are computed, and give the type of the network's weights."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    autocast = name == "bf16 autocast"
    try:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            yield torch.bfloat16 if name.startswith("bf16") and not autocast else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def peak(name: str) -> float | None:
    """Return the device's FLOP/s in an arithmetic by its data sheet, None where not known."""
    if DEVICE == "cpu":
        return None
    precision = "bf16-true" if name.startswith("bf16") else "32-true"
    return peak_of(torch.cuda.get_device_name(), precision, tf32=name == "TF32")


def share_of_peak(flops: float, seconds: float, name: str) -> str:
    """Return the MFU as a note, empty where the peak is not known."""
    known = peak(name)
    return f"MFU {flops / seconds / known:.1%}" if known else ""
