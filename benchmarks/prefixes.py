"""Measure what shared prefixes save: ``python -m benchmarks.prefixes``.

First the operations of one guided evaluation over those of an unguided one, counted exactly on
networks without memory. Then the time of PAG with shared prefixes over PAG without, by turns, and
how far the two answers are apart.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import flops, ratio
from benchmarks.overhead import DEVICE, network
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, GuidedDenoiser, Term, cost_of
from sag_dit.models.dit.network import dit
from sag_dit.models.unfilled import unfilled
from sag_dit.process import Flow, Step
from sag_dit.sampler import EulerFlow

LAYERS = ("blocks.1", "auto")
"""diffusers' default for PAG in transformers, and ours, the middle."""


def inputs(denoiser: ClassConditional, batch: int, device: str) -> tuple[Tensor, Step, Tensor]:
    """Return what a guided denoiser is asked: noise, a step in the middle, and classes."""
    grid = Flow().grid(10)
    x = torch.zeros if device == "meta" else torch.randn
    return (
        x(batch, *denoiser.latent_shape, device=device),
        Step(4, 10, grid[4], grid[5]),
        torch.zeros(batch, dtype=torch.long, device=device),
    )


def counted(size: str) -> None:
    """Print a row for each set of terms: passes by the cost, and by counted operations."""
    with unfilled():
        denoiser = ClassConditional(dit(size, learn_sigma=False), Flow(), kind="v")
    asked = inputs(denoiser, 1, "meta")
    plain = flops(partial(GuidedDenoiser(denoiser), *asked))
    cases: list[tuple[str, list[Term]]] = [
        (f"PAG in {layer}", [PAG(1.0, layers=layer)]) for layer in LAYERS
    ]
    cases.append(("CFG and PAG in auto", [CFG(2.0), PAG(1.0)]))
    for name, terms in cases:
        apart, shared = (
            flops(partial(GuidedDenoiser(denoiser, terms, share_prefixes=share), *asked)) / plain
            for share in (False, True)
        )
        rows = cost_of(denoiser, terms, EulerFlow(), 1, share_prefixes=True).rows[0]
        print(f"| {size}, {name} | {apart:.3f} | {shared:.3f} | {rows:.3f} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| operations / unguided | apart | shared | by the cost |\n|---|---|---|---|")
    with torch.no_grad():
        for size in ("DiT-S/2", "DiT-XL/2"):
            counted(size)
        print("\n| time, PAG shared / apart | ratio | quartiles | differ by |\n|---|---|---|---|")
        strong = ClassConditional(network(12, 384, 32), Flow(), kind="v")
        for batch in options.batch:
            for layer in LAYERS:
                asked = inputs(strong, batch, DEVICE)
                apart, shared = (
                    partial(
                        GuidedDenoiser(strong, [PAG(1.0, layers=layer)], share_prefixes=share),
                        *asked,
                    )
                    for share in (False, True)
                )
                one, other = apart().v, shared().v
                far = float((one - other).abs().max() / one.abs().max())
                median, low, high = ratio(shared, apart, options.rounds)
                name = f"DiT-S/2, {layer}, batch {batch}"
                print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {far:.0e} |")


if __name__ == "__main__":
    main()
