"""Measure speed and memory: ``python -m benchmarks [--peer PATH/TO/DiT] [--rounds 15]``.

    forward    our DiT-S/2 against facebookresearch/DiT's on the same weights (needs --peer, a
               checkout of it)
    capture    a forward that captures one layer's saliency against a plain one
    sampling   a 20-step run through the straight line against 20 forwards
    sag        SAG at every step against no guidance

Every figure is a ratio of two things timed by turns in this one run; absolute times are not shown,
since they say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import flops, peak_memory, randomise, ratio
from sag_dit.attention import Capture
from sag_dit.checkpoints import Model
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG, Term
from sag_dit.models import dit
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def denoiser(input_size: int) -> ClassConditional:
    """Return a DiT-S/2 with random weights, none of them zero."""
    torch.manual_seed(0)
    network = dit("DiT-S/2", input_size=input_size)
    randomise(network)
    return ClassConditional(network.to(DEVICE), DDPM()).eval()


def inputs(input_size: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, times and labels of one batch."""
    x = torch.randn(batch, 4, input_size, input_size, device=DEVICE)
    return x, torch.full((batch,), 500, device=DEVICE), torch.zeros(batch, dtype=int, device=DEVICE)


def show(name: str, measured: tuple[float, float, float], target: float) -> None:
    """Print one row."""
    median, low, high = measured
    print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {target} |", flush=True)


def forward(rounds: int, peer: str) -> None:
    """Our forward against facebookresearch/DiT's."""
    sys.path.insert(0, peer)
    theirs = importlib.import_module("models").DiT_models["DiT-S/2"](input_size=32)
    ours = denoiser(32).network
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(DEVICE).eval()
    for batch in (1, 4):
        asked = inputs(32, batch)
        gap = (ours(*asked) - theirs(*asked)).abs().max() / theirs(*asked).abs().max()
        if gap > 1e-5:
            raise SystemExit(f"the two models disagree by {gap:.1e}; timing them means nothing")
        name = f"forward, DiT-S/2, 256 tokens, batch {batch} / facebookresearch"
        show(name, ratio(partial(ours, *asked), partial(theirs, *asked), rounds), 1.0)


def capture(rounds: int) -> None:
    """Capturing one layer against a plain forward: time, FLOPs and peak memory."""
    for size in (32, 64):
        model = denoiser(size)
        level = model.process.level(500)
        wanted = [Capture(model.layer("auto"))]
        for batch in (1, 4):
            x, _, y = inputs(size, batch)
            plain, captured = partial(model, x, level, y), partial(model, x, level, y, wanted)
            name = f"capture, {size * size // 4} tokens, batch {batch}"
            show(f"{name}: time", ratio(captured, plain, rounds), 1.05)
            # Chunked saliency is plain matrix products, so FLOPs are counted, not estimated.
            print(f"| {name}: FLOPs | {flops(captured) / flops(plain):.4f} | exact | 1.01 |")
            more = peak_memory(captured) / peak_memory(plain)
            print(f"| {name}: peak memory | {more:.3f} | exact | 1.25 |", flush=True)


def drawing(guidance: tuple[Term, ...], batch: int, steps: int) -> Callable[[], object]:
    """Return a run through the straight line, latents left as they are."""
    network = denoiser(32)
    model = Model(network, IdentityCodec(), "DiT-S-2", "", {}, network.class_names)
    requests = [Request(i, 0, 0, i) for i in range(batch)]
    settings = Settings(steps=steps, batch_size=batch, guidance=guidance)
    return partial(draw, model, requests, settings)


def sampling(rounds: int) -> None:
    """A 20-step run against 20 forwards."""
    batch, steps = 4, 20
    network = denoiser(32).network
    asked = inputs(32, batch)

    def forwards() -> None:
        for _ in range(steps):
            network(*asked)

    show(
        "sampling, 20 steps / 20 forwards", ratio(drawing((), batch, steps), forwards, rounds), 1.05
    )


def sag(rounds: int) -> None:
    """SAG at every step against no guidance."""
    guided, unguided = drawing((SAG(scale=1.0),), 4, 10), drawing((), 4, 10)
    show("SAG every step / unguided, 10 steps", ratio(guided, unguided, rounds), 2.05)


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="a checkout of facebookresearch/DiT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["forward", "capture", "sampling", "sag"], nargs="*")
    options = parser.parse_args()
    chosen = options.only or ["forward", "capture", "sampling", "sag"]
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| what | ratio | quartiles | target |\n|---|---|---|---|")
    with torch.no_grad():
        if "forward" in chosen and options.peer:
            forward(options.rounds, options.peer)
        elif "forward" in chosen:
            print("| forward / facebookresearch | not run: pass --peer | | |")
        if "capture" in chosen:
            capture(options.rounds)
        if "sampling" in chosen:
            sampling(max(5, options.rounds // 3))
        if "sag" in chosen:
            sag(max(5, options.rounds // 3))


if __name__ == "__main__":
    main()
