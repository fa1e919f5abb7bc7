"""Measure what guidance costs beyond its forward passes: ``python -m benchmarks.overhead``.

Each row is the time of one guided evaluation over that of the very batches that it gives to the
networks, evaluated plainly: what terms compute, read and edit is all that differs. Both are
timed by turns. The target for all methods together is 1.05.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import randomise, ratio
from benchmarks.methods import classes, setting
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import GuidedDenoiser
from sag_dit.models import DiT
from sag_dit.noise import NoiseSource
from sag_dit.process import Flow, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGET = 1.05


def network(depth: int, width: int, size: int) -> DiT:
    """Return a DiT with random weights, none of them zero."""
    torch.manual_seed(0)
    made = DiT(size, 2, 4, width, depth, width // 64, num_classes=10, learn_sigma=False)
    randomise(made)
    return made.to(DEVICE).eval().requires_grad_(False)


class Classifier(nn.Module):
    """A classifier as large as nothing, so that guidance's own work is what is seen."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 10)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.linear(x_t.mean(dim=(2, 3)))
        return logits


Batch = tuple[nn.Module, tuple[Tensor, ...]]


def batches(asking: GuidedDenoiser, networks: Sequence[nn.Module], *asked: object) -> list[Batch]:
    """Return what one guided evaluation gives to the networks."""
    seen: list[Batch] = []
    handles = [
        each.register_forward_pre_hook(lambda module, args: seen.append((module, args)))
        for each in networks
    ]
    asking(*asked)  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    return seen


def plainly(given: Sequence[Batch]) -> None:
    """Evaluate batches without guidance."""
    for module, arguments in given:
        module(*arguments)


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--size", type=int, default=32, help="of the latent; patches are 2 x 2")
    parser.add_argument("--only", nargs="*", help="names of rows, as printed")
    options = parser.parse_args()
    strong, weak = (network(depth, options.width, options.size) for depth in (options.depth, 1))
    model, worse = (ClassConditional(each, Flow(), kind="v") for each in (strong, weak))
    classifier = Classifier(4).to(DEVICE).requires_grad_(False)
    guiding = [each for each in classes() if not each.needs & {"text", "cross"}]
    terms = [setting(each, 0.5, worse=worse, classifier=classifier) for each in guiding]
    sets = {type(term).__name__: [term] for term in terms} | {"all of them": terms}
    x = torch.randn(options.batch, 4, options.size, options.size, device=DEVICE)
    y = torch.zeros(options.batch, dtype=torch.long, device=DEVICE)
    grid = Flow().grid(10)
    step = Step(4, 10, grid[4], grid[5])
    noise = NoiseSource([0] * options.batch, range(options.batch))
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| guidance | rows | time / its forward passes | quartiles |\n|---|---|---|---|")
    with torch.no_grad():
        for name, chosen in sets.items():
            if options.only and name not in options.only:
                continue
            asking = GuidedDenoiser(model, chosen, noise=noise)
            given = batches(asking, [strong, weak], x, step, y)
            rows = " + ".join(str(len(arguments[0])) for _, arguments in given)
            median, low, high = ratio(
                partial(asking, x, step, y), partial(plainly, given), options.rounds
            )
            print(f"| {name} | {rows} | {median:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    print(f"\ntarget for all of them: {TARGET}")


if __name__ == "__main__":
    main()
