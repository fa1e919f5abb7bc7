"""The same work by facebookresearch/DiT and diffusers, on equal weights, outputs compared first."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.passes import GUIDANCE, inputs
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.sizes import DEVICE, Scale, arithmetic, autoencoder, model, network
from benchmarks.measure import ratio
from benchmarks.training import imported
from sag_dit.models import SIZES, DiT
from sag_dit.models.dit.layouts import to_diffusers
from sag_dit.sampler import Ancestral
from sag_dit.sampling import Request, Settings, draw, trajectory

LARGEST_GAP = {"facebookresearch": 1e-4, "diffusers": 0.1}
"""Bounds on how far outputs may be apart, by the largest of ours; diffusers' arithmetic differs."""


def gap(ours: Tensor, theirs: Tensor, peer: str, rows: Rows) -> None:
    """State how far two outputs are apart.

    Raises:
        ValueError: so far that timing them means nothing.
    """
    found = float((ours.float() - theirs.float()).abs().max() / ours.float().abs().max())
    rows.add(f"largest difference of outputs, ours and {peer}", "fp32", found)
    if not found <= LARGEST_GAP[peer]:
        raise ValueError(f"{peer}'s output differs by {found:.1e}: timing it means nothing")


def side_by_side(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    what: str,
    setting: str,
    rows: Rows,
) -> None:
    """Keep the ratio of our time to a peer's, timed by turns."""
    median, low, high = ratio(ours, theirs, rounds)
    rows.add(what, setting, median, "", f"{low:.3f} to {high:.3f}")


def passes(
    made: DiT, theirs: Callable[..., Any], peer: str, latent: int, scale: Scale, rows: Rows
) -> None:
    """Compare single passes in TF32 and under bf16 autocast."""
    for batch in (scale.batches[0], scale.batch):
        asked = inputs(latent, batch, torch.float32)
        for name in ("TF32", "bf16 autocast"):
            cast = (
                torch.autocast(DEVICE, torch.bfloat16)
                if name.startswith("bf16")
                else contextlib.nullcontext()
            )
            with arithmetic("TF32"), cast:
                what = f"a pass: our time / {peer}"
                side_by_side(
                    partial(made, *asked),
                    partial(theirs, *asked),
                    scale.rounds,
                    what,
                    f"{name}, batch {batch}",
                    rows,
                )


def facebook(scale: Scale, rows: Rows, folder: str) -> None:
    """Compare with facebookresearch's network and its sampling loop."""
    sys.path.insert(0, folder)
    latent = scale.latent
    made = network(SIZES[scale.peer], latent)
    with torch.device(DEVICE):
        theirs: nn.Module = imported(folder, "facebookresearch").DiT_models[scale.peer](
            input_size=latent
        )
    theirs.load_state_dict(made.state_dict())
    theirs = theirs.to(DEVICE).eval()
    asked = inputs(latent, 2, torch.float32)
    gap(made(*asked), theirs(*asked), "facebookresearch", rows)
    passes(made, theirs, "facebookresearch", latent, scale, rows)

    # Their sample.py: 2 b rows of one noise, the second half with the null class, half discarded.
    batch, steps = scale.batches[0], scale.steps
    diffusion = importlib.import_module("diffusion").create_diffusion(str(steps))
    x = torch.randn(batch, 4, latent, latent, device=DEVICE)
    labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)]).to(DEVICE)

    def their_loop() -> None:
        diffusion.p_sample_loop(
            theirs.forward_with_cfg,  # type: ignore[arg-type]
            (2 * batch, 4, latent, latent),
            torch.cat([x, x]),
            clip_denoised=False,
            model_kwargs={"y": labels, "cfg_scale": 1.5},
            device=DEVICE,
        )

    drawn = model(made, autoencoder(scale))
    settings = Settings(Ancestral(), steps, GUIDANCE["CFG"], batch)
    requests = [Request(i, 0, i, i) for i in range(batch)]

    def our_loop() -> None:
        for _ in trajectory(drawn, requests, settings):
            pass

    with arithmetic("TF32"):
        what = f"CFG, {steps} ancestral steps, latents: our time / facebookresearch"
        side_by_side(our_loop, their_loop, 3, what, f"TF32, batch {batch}", rows)


def diffusers(scale: Scale, rows: Rows) -> None:
    """Compare with diffusers' DiT transformer and its DiTPipeline."""
    from diffusers import DDIMScheduler, DiTPipeline
    from diffusers.models import DiTTransformer2DModel

    size, latent = scale.network, scale.latent
    made = network(size, latent)
    with torch.device(DEVICE):
        transformer = DiTTransformer2DModel(
            num_attention_heads=size["num_heads"],
            attention_head_dim=size["hidden_size"] // size["num_heads"],
            in_channels=4,
            out_channels=8,
            num_layers=size["depth"],
            sample_size=latent,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_eps=1e-6,
        )
    transformer.load_state_dict(to_diffusers(made.state_dict(), size["depth"]))
    transformer = transformer.to(DEVICE).eval()

    def theirs(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = transformer(x, timestep=t.long(), class_labels=y).sample
        return out

    asked = inputs(latent, 2, torch.float32)
    gap(made(*asked), theirs(*asked), "diffusers", rows)
    passes(made, theirs, "diffusers", latent, scale, rows)

    batch, vae = scale.batches[0], autoencoder(scale)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    drawn = model(made, vae)
    settings = Settings(steps=scale.steps, guidance=GUIDANCE["CFG"], batch_size=batch)
    requests = [Request(i, 0, i, i) for i in range(batch)]

    def their_images() -> None:
        pipeline(
            class_labels=list(range(batch)),
            guidance_scale=1.5,
            num_inference_steps=scale.steps,
            output_type="np",
        )

    with arithmetic("TF32"):
        what = f"CFG, {scale.steps} DDIM steps, decoded: our time / DiTPipeline"
        ours = partial(draw, drawn, requests, settings)
        side_by_side(ours, their_images, 3, what, f"TF32, batch {batch}", rows)


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Compare with each peer; one that fails leaves the other."""
    with torch.no_grad():
        with rows.attempt("diffusers"):
            diffusers(scale, rows)
        if peer is None:
            rows.add("facebookresearch", "", "not run: --peer names no checkout")
            return
        with rows.attempt("facebookresearch"):
            facebook(scale, rows, peer)
