"""Measure speed and memory: ``python -m benchmarks --peer PATH/TO/DiT --fast PATH/TO/fast-DiT``.

    own        what we add to bare passes: reading attention, the sampling loop, SAG
    peers      passes and whole runs beside facebookresearch/DiT, fast-DiT and diffusers
    training   a training step beside theirs

Every figure is a ratio of two things timed by turns in this one run, as a median with its
quartiles; absolute times are not shown, since they say more about the machine than about the code.
A ratio below 1 is in our favour. The table is written to ``outputs/bench/bench.md`` as well.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import lightning
import torch

from benchmarks import peers, training
from benchmarks.measure import flops, peak_memory, ratio
from benchmarks.rows import Rows, read, side_by_side
from benchmarks.sizes import CPU_SCALE, DEVICE, GUIDANCE, TINY_SCALE, Scale, inputs, model, network
from sag_dit.attention import Capture
from sag_dit.cli.app import quiet_lightning
from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, draw

PARTS = {
    "own": "Beside our own bare passes",
    "peers": "Ours to a peer's",
    "training": "A training step, ours to a peer's",
}


def capture(scale: Scale, rows: Rows) -> None:
    """Reading one layer's saliency against a plain pass: time, FLOPs and peak memory."""
    for latent, batches in ((scale.latent, scale.batches), (scale.large_latent, scale.batches)):
        denoiser = ClassConditional(network(scale.network, latent), DDPM()).eval()
        wanted = [Capture(denoiser.layer("auto"))]
        for batch in batches:
            x, _, y = inputs(latent, batch, torch.float32)
            plain = partial(denoiser, x, denoiser.process.level(500), y)
            reading = partial(plain, wanted)
            where = f"{latent**2 // 4:,} tokens, batch {batch}"
            median, low, high = ratio(reading, plain, scale.rounds)
            memory = peak_memory(reading) / peak_memory(plain)
            note = f"{low:.3f} to {high:.3f}; memory {memory:.2f}"
            rows.add("a pass that reads one layer / a plain one", where, median, "", note)
            rows.add("the same: FLOPs", where, flops(reading) / flops(plain))


def drawing(guidance: str, scale: Scale, steps: int) -> Callable[[], object]:
    """Return a run through the straight line, latents left as they are."""
    drawn = model(network(scale.network, scale.latent), None)
    requests = [Request(i, 0, 0, i) for i in range(scale.batch)]
    settings = Settings(steps=steps, batch_size=scale.batch, guidance=GUIDANCE[guidance])
    return partial(draw, drawn, requests, settings)


def own(scale: Scale, rows: Rows) -> None:
    """What we add to bare passes of the network."""
    capture(scale, rows)
    made, steps = network(scale.network, scale.latent), 2 * scale.steps
    asked = inputs(scale.latent, scale.batch, torch.float32)

    def forwards() -> None:
        for _ in range(steps):
            made(*asked)

    for what, work, base in (
        (f"a run of {steps} steps / {steps} passes", drawing("unguided", scale, steps), forwards),
        (
            f"SAG at each of {scale.steps} steps / unguided",
            drawing("SAG", scale, scale.steps),
            drawing("unguided", scale, scale.steps),
        ),
    ):
        median, low, high = ratio(work, base, scale.run_rounds)
        rows.add(what, f"batch {scale.batch}", median, "", f"{low:.3f} to {high:.3f}")


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="a checkout of facebookresearch/DiT")
    parser.add_argument("--fast", help="a checkout of chuanyangjin/fast-DiT")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", default="outputs/bench", help="folder for bench.md")
    parser.add_argument("--tiny", action="store_true", help="show that it works, with tiny sizes")
    options = parser.parse_args()
    quiet_lightning()
    scale = TINY_SCALE if options.tiny else CPU_SCALE
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "bench.rows"
    file.unlink(missing_ok=True)
    failed = 0
    for part in options.only:
        rows = Rows(file, part)
        with rows.attempt(part):
            if part == "own":
                with torch.no_grad():
                    own(scale, rows)
            elif part == "peers":
                peers.run(scale, rows, options.peer, options.fast)
            else:
                training.run(scale, rows, options.peer, options.fast)
        failed += rows.failed
    about = {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "diffusers": diffusers.__version__,
        "Python": platform.python_version(),
        "device": DEVICE,
        "threads": str(torch.get_num_threads()),
    }
    kept = read(file)
    table = "; ".join(f"{name}: {value}" for name, value in about.items())
    for part in options.only:
        of_part = [row for row in kept if row.phase == part]
        table += f"\n\n### {PARTS[part]}\n\n{side_by_side(of_part)}"
    table += "\n"
    (out / "bench.md").write_text(table, "utf-8")
    print(f"\n{table}\ntable: {out / 'bench.md'}")
    if failed:
        raise SystemExit(f"{failed} measurements failed")


if __name__ == "__main__":
    main()
