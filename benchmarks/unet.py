"""Measure our ADM forward against the original's: ``python -m benchmarks.unet PATH``.

PATH is a checkout of openai/guided-diffusion, whose UNet gets random weights that are then loaded
into ours. Passes alternate in one run, and the median of their ratios is printed with its
quartiles; so is how far the outputs are apart, and what reading one layer's saliency adds. By
default a GPU runs the sizes of ADM-256, and a CPU a smaller network of its kind.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_memory, ratio
from sag_dit.attention import AttentionTap, Capture
from sag_dit.checkpoints.loading import fill
from sag_dit.models import families
from sag_dit.models.unet.adapter import convert
from sag_dit.models.unet.network import UNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_CHANNELS = 64


def networks(checkout: Path, side: int, channels: int) -> tuple[Any, UNet]:
    """Return the original network and ours with the same random weights."""
    sys.path.insert(0, str(checkout))
    original = import_module("guided_diffusion.script_util").create_model(
        side,
        channels,
        2,
        learn_sigma=True,
        attention_resolutions="32,16,8",
        num_head_channels=HEAD_CHANNELS,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    for parameter in original.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    stated = {"model": {"input_size": side, "num_head_channels": HEAD_CHANNELS}}
    converted = convert(original.state_dict(), Path("random.pt"), stated)
    with torch.device("meta"):
        ours = families()["unet"].build(converted.model)
    assert isinstance(ours, UNet)
    fill(ours, converted.state, Path("random.pt"))
    return original.to(DEVICE).eval(), ours.to(DEVICE).eval()


def main() -> None:
    """Print the comparison."""
    gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="checkout of openai/guided-diffusion")
    parser.add_argument("--side", type=int, default=256 if gpu else 64)
    parser.add_argument("--channels", type=int, default=256 if gpu else 64)
    parser.add_argument("--batch", type=int, default=4 if gpu else 2)
    parser.add_argument("--rounds", type=int, default=30 if gpu else 15)
    args = parser.parse_args()
    original, ours = networks(args.checkout, args.side, args.channels)
    x = torch.randn(args.batch, 3, args.side, args.side, device=DEVICE)
    t = torch.randint(0, 1000, (args.batch,), device=DEVICE)
    layer = ours.layers[ours.aliases["output_blocks.2"]]

    def theirs() -> Tensor:
        out: Tensor = original(x, t)
        return out

    def plain() -> Tensor:
        return ours(x, t, torch.zeros_like(t))

    def captured() -> Tensor:
        with AttentionTap(ours, [Capture(layer)]):
            return plain()

    with torch.no_grad():
        far = ((plain() - theirs()).norm() / theirs().norm()).item()
        size = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
        print(f"{size:.0f} M parameters, {args.side} px, batch {args.batch}, {DEVICE}")
        print(f"outputs differ by {far:.1e}")
        for name, work, base in (
            ("ours / original", plain, theirs),
            ("ours with saliency / ours", captured, plain),
        ):
            median, low, high = ratio(work, base, args.rounds)
            print(f"{name}: time {median:.2f} ({low:.2f} to {high:.2f})", end="")
            print(f", peak memory {peak_memory(work) / peak_memory(base):.2f}")


if __name__ == "__main__":
    main()
