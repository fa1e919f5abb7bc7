"""The same work by facebookresearch/DiT, fast-DiT and diffusers, on equal weights.

Outputs are compared first. What is timed is timed by turns, and its peak memory compared.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_memory, randomise, ratio
from benchmarks.rows import Rows
from benchmarks.sizes import (
    DEVICE,
    GUIDANCE,
    Scale,
    arithmetic,
    autoencoder,
    inputs,
    model,
    network,
)
from benchmarks.training import imported
from sag_dit.guidance import SAG
from sag_dit.models.dit.layouts import to_diffusers
from sag_dit.pipelines import guide
from sag_dit.sampler import Ancestral
from sag_dit.sampling import Request, Settings, draw, trajectory

SAME, ALIKE, OTHERWISE = 1e-4, 0.01, 0.1
"""How far outputs may be apart, by the largest of ours.

Equal but for rounding; with a mask, to whose other side a token near its threshold may round; and
diffusers' DiT, whose embedding of the time is another.
"""

Work = Callable[[], object]
Pass = Callable[..., Any]


def gap(ours: Tensor, theirs: Tensor, bound: float, what: str, peer: str, rows: Rows) -> None:
    """State how far two outputs are apart.

    Raises:
        ValueError: so far that timing them means nothing.
    """
    found = float((ours.float() - theirs.float()).abs().max() / ours.float().abs().max())
    rows.add(f"{what}: largest difference of outputs", peer, found)
    if not found <= bound:
        raise ValueError(f"{peer}'s output differs by {found:.1e}: timing it means nothing")


def side_by_side(ours: Work, theirs: Work, rounds: int, what: str, peer: str, rows: Rows) -> None:
    """Keep the ratios of our time and memory to a peer's."""
    median, low, high = ratio(ours, theirs, rounds)
    memory = peak_memory(ours) / peak_memory(theirs)
    rows.add(what, peer, median, "", f"{low:.3f} to {high:.3f}; memory {memory:.2f}")


def sides(scale: Scale) -> tuple[tuple[int, int], ...]:
    """Return latent sizes, each with the batch of whole runs."""
    return (scale.latent, scale.batches[0]), (scale.large_latent, scale.large_batch)


def passes(ours: nn.Module, theirs: Pass, peer: str, latent: int, scale: Scale, rows: Rows) -> None:
    """Compare single passes, in each arithmetic."""
    tokens = f"{latent**2 // 4:,} tokens"
    asked = inputs(latent, 2, torch.float32)
    with arithmetic("fp32"):
        bound = OTHERWISE if peer == "diffusers" else SAME
        gap(ours(*asked), theirs(*asked), bound, f"a pass, {tokens}", peer, rows)
    small = latent == scale.latent
    for batch in (scale.batches[0], scale.batch) if small else (scale.large_batch,):
        asked = inputs(latent, batch, torch.float32)
        for name in scale.arithmetics:
            with arithmetic(name):
                what = f"a pass, {name}, {tokens}, batch {batch}"
                work = partial(ours, *asked), partial(theirs, *asked)
                side_by_side(*work, scale.rounds, what, peer, rows)


def published(scale: Scale, rows: Rows, peer: str, folder: str) -> None:
    """Compare with the network of facebookresearch/DiT, or of fast-DiT, and their ``sample.py``."""
    sys.path.insert(0, folder)
    diffusion = importlib.import_module("diffusion").create_diffusion(str(scale.steps))
    models = imported(folder, peer.replace("-", "_"))
    for latent, batch in sides(scale):
        made = network(scale.network, latent)
        with torch.device(DEVICE):
            theirs: nn.Module = models.DiT(input_size=latent, **scale.network)
        theirs.load_state_dict(made.state_dict())
        theirs = theirs.to(DEVICE).eval()
        passes(made, theirs, peer, latent, scale, rows)

        # Their sample.py: 2 b rows of one noise, the second half with the null class.
        x = torch.randn(batch, 4, latent, latent, device=DEVICE)
        labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)]).to(DEVICE)
        loop = partial(
            diffusion.p_sample_loop,
            theirs.forward_with_cfg,
            (2 * batch, 4, latent, latent),
            torch.cat([x, x]),
            clip_denoised=False,
            model_kwargs={"y": labels, "cfg_scale": 1.5},
            device=DEVICE,
        )
        drawn = model(made, None)
        settings = Settings(Ancestral(), scale.steps, GUIDANCE["CFG"], batch)
        requests = [Request(i, 0, i, i) for i in range(batch)]
        with arithmetic(scale.arithmetics[0]):
            what = f"CFG, {scale.steps} ancestral steps to latents"
            what += f", {latent**2 // 4:,} tokens, batch {batch}"
            ours = partial(_run, drawn, requests, settings)
            side_by_side(ours, loop, scale.run_rounds, what, peer, rows)


def _run(*arguments: Any) -> None:
    for _ in trajectory(*arguments):
        pass


def dit_pipeline(scale: Scale, rows: Rows) -> None:
    """Compare with diffusers' DiT transformer and its DiTPipeline."""
    from diffusers import DDIMScheduler, DiTPipeline
    from diffusers.models import DiTTransformer2DModel

    size, vae = scale.network, autoencoder(scale)
    for latent, batch in sides(scale):
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

        def theirs(x: Tensor, t: Tensor, y: Tensor, network: Any = transformer) -> Tensor:
            out: Tensor = network(x, timestep=t.long(), class_labels=y).sample
            return out

        passes(made, theirs, "diffusers", latent, scale, rows)
        pipeline = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
        pipeline.set_progress_bar_config(disable=True)
        their_images = partial(
            pipeline,
            class_labels=list(range(batch)),
            guidance_scale=1.5,
            num_inference_steps=scale.steps,
            output_type="np",
        )
        settings = Settings(steps=scale.steps, guidance=GUIDANCE["CFG"], batch_size=batch)
        requests = [Request(i, 0, i, i) for i in range(batch)]
        with arithmetic(scale.arithmetics[0]):
            what = f"DiTPipeline: CFG, {scale.steps} DDIM steps, decoded"
            what += f", {latent**2 // 4:,} tokens, batch {batch}"
            ours = partial(draw, model(made, vae), requests, settings)
            side_by_side(ours, their_images, scale.run_rounds, what, "diffusers", rows)


def sag_pipeline(scale: Scale, rows: Rows) -> None:
    """Compare ``guide(pipe, SAG())`` with diffusers' StableDiffusionSAGPipeline."""
    import diffusers

    # A network of Stable Diffusion's form with random weights, and prompts as embeddings.
    assert scale.unet is not None
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=scale.latent, **scale.unet)
    randomise(unet)
    parts: dict[str, Any] = {
        "vae": autoencoder(scale),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet.to(DEVICE).eval(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    plain = diffusers.StableDiffusionPipeline(**parts)
    theirs = diffusers.StableDiffusionSAGPipeline(**parts)
    prompt, null = torch.randn(2, 1, 8, scale.unet["cross_attention_dim"], device=DEVICE)
    call: dict[str, Any] = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": null,
        "num_inference_steps": scale.steps,
        "latents": torch.randn(1, 4, scale.latent, scale.latent, device=DEVICE),
        "output_type": "pt",
    }
    for each in (plain, theirs):
        each.set_progress_bar_config(disable=True)
    for scale_of_cfg in (1.0, 5.0):
        call["guidance_scale"] = scale_of_cfg
        guided = partial(_guided, plain, call)
        their_images = partial(theirs, sag_scale=0.75, **call)
        what = f"StableDiffusionSAGPipeline: SAG 0.75, CFG {scale_of_cfg:g}"
        what += f", {scale.steps} DDIM steps, decoded"
        gap(guided(), their_images().images, ALIKE, what, "diffusers", rows)
        side_by_side(guided, their_images, scale.run_rounds, what, "diffusers", rows)


def _guided(pipe: Any, call: dict[str, Any]) -> Tensor:
    with guide(pipe, SAG(0.75)):
        images: Tensor = pipe(**call).images
    return images


def run(scale: Scale, rows: Rows, peer: str | None = None, fast: str | None = None) -> None:
    """Compare with each peer; one that fails leaves the others."""
    warnings.filterwarnings("ignore", "__array_", DeprecationWarning)
    with torch.no_grad():
        with rows.attempt("diffusers"):
            dit_pipeline(scale, rows)
        if scale.unet is not None:
            with rows.attempt("StableDiffusionSAGPipeline"):
                sag_pipeline(scale, rows)
        for name, option, folder in (
            ("facebookresearch", "--peer", peer),
            ("fast-DiT", "--fast", fast),
        ):
            if folder is None:
                rows.add(name, "", f"not run: {option} names no checkout")
                continue
            with rows.attempt(name):
                published(scale, rows, name, folder)
