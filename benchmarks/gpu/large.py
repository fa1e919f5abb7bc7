"""512 x 512: what reading attention costs at 1,024 tokens, and images end to end."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.passes import captured, one_pass
from benchmarks.measure import peak_memory, seconds
from benchmarks.rows import Rows
from benchmarks.sizes import GUIDANCE, Scale, arithmetic, autoencoder, inputs, model, network
from sag_dit.attention import Capture
from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings, draw


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Measure in bf16."""
    latent, batch = scale.large_latent, scale.large_batch
    with arithmetic("bf16") as dtype, torch.no_grad():
        made = network(scale.network, latent).to(dtype)
        where = f"bf16, {latent**2 // 4:,} tokens, batch {batch}"
        took, share = one_pass(made, latent, batch, "bf16", scale.rounds)
        rows.add("a pass", where, 1e3 * took, "ms", share)
        median, low, high = captured(made, latent, batch, scale.rounds)
        what = "a pass that captures one layer / a plain one"
        rows.add(f"{what}: time", where, median, "", f"{low:.3f} to {high:.3f}")
        denoiser = ClassConditional(made, DDPM()).eval()
        x, _, y = inputs(latent, batch, torch.float32)
        plain = partial(denoiser, x, denoiser.process.level(500), y)
        reading = partial(plain, [Capture(denoiser.layer("auto"))])
        rows.add(f"{what}: peak memory", where, peak_memory(reading) / peak_memory(plain))
        drawn = model(made, autoencoder(scale))
        requests = [Request(i, 0, i, i) for i in range(batch)]
        for label in ("unguided", "SAG"):
            settings = Settings(steps=scale.steps, batch_size=batch, guidance=GUIDANCE[label])
            work = partial(draw, drawn, requests, settings)
            work()
            what = f"drawing, {scale.steps} steps, decoded: {label}"
            rows.add(what, where, batch / seconds(work), "images/s")
