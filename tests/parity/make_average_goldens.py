"""Runs NVlabs/edm2's power-function averages on a fixed walk of weights and stores what they give.

Needs a checkout of NVlabs/edm2, which this project neither contains nor imports anywhere else. From
the root of the repository, on a CPU:

    python -m tests.parity.make_average_goldens PATH/TO/edm2

It writes `average_goldens.safetensors` beside this file. The tests that read it need no checkout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

GOLDENS = Path(__file__).with_name("average_goldens.safetensors")
STEPS = 60
EVERY = 6
TRACKED = (0.05, 0.1)
MADE = (0.03, 0.05, 0.075, 0.15, 0.25)
WIDTHS = (0.01, 0.05, 0.1, 0.2, 0.28)
WALK = np.random.default_rng(0).normal(size=(STEPS, 12)).cumsum(0).astype(np.float32)
"""The weights after each step."""


def at(step: int) -> dict[str, torch.Tensor]:
    """The weights of a layer after a step, counted from 1."""
    return {"weight": torch.from_numpy(WALK[step - 1]).view(3, 4)}


def main() -> None:
    """Write the goldens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("edm2", help="a checkout of NVlabs/edm2")
    sys.path.insert(0, parser.parse_args().edm2)
    from training import phema  # type: ignore[import-not-found]

    layer = nn.Linear(4, 3, bias=False)
    layer.load_state_dict(at(1))
    averages = phema.PowerFunctionEMA(layer, stds=list(TRACKED))
    kept: list[tuple[int, float, torch.Tensor]] = []
    goldens = {"gamma": torch.from_numpy(phema.std_to_exp(np.array(WIDTHS)))}
    for step in range(1, STEPS + 1):
        layer.load_state_dict(at(step))
        averages.update(cur_nimg=step, batch_size=1)
        if step % EVERY == 0:
            for sigma_rel, each in zip(TRACKED, averages.emas, strict=True):
                kept.append((step, sigma_rel, each.weight.detach().clone()))
                goldens[f"tracked.{step}.{sigma_rel}"] = kept[-1][2]
    coefficients = phema.solve_posthoc_coefficients(
        [step for step, _, _ in kept], [width for _, width, _ in kept], STEPS, list(MADE)
    )
    goldens["coefficients"] = torch.from_numpy(coefficients)
    for column, sigma_rel in enumerate(MADE):
        made = torch.zeros(3, 4)
        for (_, _, weight), share in zip(kept, coefficients[:, column], strict=True):
            made += weight * share
        goldens[f"made.{sigma_rel}"] = made
    save_file(goldens, GOLDENS)


if __name__ == "__main__":
    main()
