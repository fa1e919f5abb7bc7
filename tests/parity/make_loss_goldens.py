"""Runs the published training losses on fixed weights and inputs and stores what they return.

Needs a checkout of facebookresearch/DiT, which this project neither contains nor imports anywhere
else. From the root of the repository, on a CPU:

    python -m tests.parity.make_loss_goldens PATH/TO/DiT

It writes `loss_goldens.safetensors` beside this file. The tests that read it need no checkout.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import fixed as f
from .make_goldens import network

GOLDENS = Path(__file__).with_name("loss_goldens.safetensors")

LABELS = (4, 10, 0, 9, 3, 10, 7, 1)  # 10 is the null label


@dataclass(frozen=True)
class Case:
    """One batch with an image at each of `times`: which network, process and kind of output."""

    size: str = "learned"
    schedule: str = "linear"
    kind: str = "eps"
    num_timesteps: int = 1000
    times: tuple[int, ...] = (0, 0, 1, 2, 30, 250, 500, 999)
    rescaled: bool = False

    @property
    def labels(self) -> Tensor:
        """One label per image."""
        return torch.tensor(LABELS[: len(self.times)])

    @property
    def x_0(self) -> Tensor:
        """Clean images, uniform within 1.39 of 0: a quarter of them lie outside [-1, 1]."""
        return 0.8 * f.latent("loss.x_0", f.SIZES[self.size], len(self.times))

    @property
    def noise(self) -> Tensor:
        """What they are noised with."""
        return f.latent("loss.noise", f.SIZES[self.size], len(self.times))


CASES = {
    "linear": Case(),
    "cosine": Case(schedule="cosine"),
    "x_0": Case(kind="x_0"),
    "short": Case(num_timesteps=250, times=(0, 1, 8, 125, 249), rescaled=True),
    "plain": Case(size="plain"),
    "plain_x_0": Case(size="plain", schedule="cosine", kind="x_0"),
}


def gradients(losses: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of each image's loss by itself, one row per image."""
    rows = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in losses]
    return torch.stack(rows)


def losses(models: ModuleType, diffusion: ModuleType) -> dict[str, Tensor]:
    """Losses, their parts, and how they pull at the bias of the network's last layer."""
    out: dict[str, Tensor] = {}
    for name, case in CASES.items():
        dit: Any = network(models, case.size)
        process = diffusion.create_diffusion(
            "",
            noise_schedule=f.SCHEDULES[case.schedule],
            predict_xstart=case.kind == "x_0",
            learn_sigma=f.SIZES[case.size].learn_sigma,
            rescale_learned_sigmas=case.rescaled,
            diffusion_steps=case.num_timesteps,
        )
        terms = process.training_losses(
            dit, case.x_0, torch.tensor(case.times), {"y": case.labels}, case.noise
        )
        out |= {f"{name}.{part}": value.detach().clone() for part, value in terms.items()}
        out[f"{name}.gradient"] = gradients(terms["loss"], dit.final_layer.linear.bias)
    return out


def main() -> None:
    """Make every golden and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dit", type=Path, help="checkout of facebookresearch/DiT")
    parser.add_argument("--out", type=Path, default=GOLDENS)
    args = parser.parse_args()
    sys.path.insert(0, str(args.dit))

    import diffusion  # type: ignore[import-not-found]
    import models  # type: ignore[import-not-found]

    goldens = losses(models, diffusion)
    for key, value in goldens.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite")
    save_file({key: value.contiguous() for key, value in goldens.items()}, args.out)
    size = args.out.stat().st_size
    print(f"{len(goldens)} tensors, {size / 1024:.0f} KiB, in {args.out}")


if __name__ == "__main__":
    main()
