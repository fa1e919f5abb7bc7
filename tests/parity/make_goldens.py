"""Runs the published originals on fixed weights and inputs and stores what they return.

Needs checkouts of facebookresearch/DiT and SusungHong/Self-Attention-Guidance, which this project
neither contains nor imports anywhere else. From the root of the repository, on a CPU:

    python -m tests.parity.make_goldens PATH/TO/DiT PATH/TO/Self-Attention-Guidance

It writes `goldens.safetensors` beside this file. The tests that read it need neither checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from . import fixed as f

Goldens = dict[str, Tensor]


@contextmanager
def returned_noise(draw: Callable[[int, tuple[int, ...]], Tensor]) -> Iterator[None]:
    """While open, call number i of `torch.randn_like` returns `draw(i, shape)`."""
    calls = iter(range(10**6))

    def randn_like(x: Tensor) -> Tensor:
        return draw(next(calls), tuple(x.shape))

    with mock.patch.object(torch, "randn_like", randn_like):
        yield


def network(models: ModuleType, name: str) -> Any:
    """The original DiT of one small size with the fixed weights."""
    size = f.SIZES[name]
    built = models.DiT(
        input_size=size.input_size,
        patch_size=size.patch_size,
        in_channels=size.in_channels,
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=size.num_classes,
        learn_sigma=size.learn_sigma,
    )
    f.fill(built)
    return built.eval()


def diffusion_of(diffusion: ModuleType, steps: int, schedule: str, variance: str) -> Any:
    """The original respaced process."""
    return diffusion.create_diffusion(
        str(steps),
        noise_schedule=f.SCHEDULES[schedule],
        sigma_small=variance == "fixed_small",
        learn_sigma=variance == "learned",
    )


def forwards(models: ModuleType) -> Goldens:
    """Positions, forward passes at whole and fractional t, and guided forward passes."""
    out: Goldens = {}
    y = torch.tensor(f.FORWARD_Y)
    for name, size in f.SIZES.items():
        dit = network(models, name)
        x = f.latent("forward.x", size, len(y))
        out[f"forward.{name}.pos_embed"] = dit.pos_embed.detach().clone()
        out[f"forward.{name}.whole_t"] = dit(x, torch.tensor(f.FORWARD_T).long(), y)
        out[f"forward.{name}.real_t"] = dit(x, torch.tensor(f.FORWARD_T_REAL), y)
    for name in ("learned", "plain"):
        size, dit = f.SIZES[name], network(models, name)
        z = f.latent("cfg.x", size, len(f.CFG_Y))
        labels = torch.tensor([*f.CFG_Y, *[size.null] * len(f.CFG_Y)])
        for scale in f.CFG_SCALES:
            for t in f.CFG_T:
                batch = torch.full((len(labels),), t)
                both = dit.forward_with_cfg(torch.cat([z, z]), batch, labels, scale)
                out[f"cfg.{name}.{scale}.{t}"] = both[: len(z)]
    return out


def schedules(diffusion: ModuleType) -> Goldens:
    """Float64 tables of both schedules, whole and respaced."""
    out: Goldens = {}
    for schedule in f.SCHEDULES:
        for steps in (1000, *f.STEP_COUNTS):
            process = diffusion_of(diffusion, steps, schedule, "learned")
            key = f"schedule.{schedule}.{steps}"
            out[f"{key}.timestep_map"] = torch.tensor(process.timestep_map)
            out[f"{key}.alphas_cumprod"] = torch.from_numpy(process.alphas_cumprod)
            if steps == 1000:
                out[f"{key}.betas"] = torch.from_numpy(process.betas)
                continue
            out[f"{key}.fixed_small"] = torch.from_numpy(process.posterior_log_variance_clipped)
            large = np.append(process.posterior_variance[1], process.betas[1:])
            out[f"{key}.fixed_large"] = torch.from_numpy(np.log(large))
    return out


def posteriors(models: ModuleType, diffusion: ModuleType) -> Goldens:
    """Ancestral mean and log-variance, learned at every count and fixed at one."""
    out: Goldens = {}
    cases = [("learned", s, n) for s in f.SCHEDULES for n in f.STEP_COUNTS]
    cases += [("fixed_small", "linear", f.RUN_STEPS), ("fixed_large", "linear", f.RUN_STEPS)]
    labels = torch.tensor(f.POSTERIOR_Y)
    for variance, schedule, steps in cases:
        name = "learned" if variance == "learned" else "plain"
        process = diffusion_of(diffusion, steps, schedule, variance)
        dit = network(models, name)
        for index in f.indices(steps):
            x = f.latent(f"posterior.x.{index}", f.SIZES[name], len(labels))
            t = torch.full((len(labels),), index)
            key = f"posterior.{variance}.{schedule}.{steps}.{index}"
            for clamp in (False, True):
                result = process.p_mean_variance(
                    dit, x, t, clip_denoised=clamp, model_kwargs={"y": labels}
                )
                out[f"{key}.mean.{'clamped' if clamp else 'free'}"] = result["mean"]
            out[f"{key}.log_variance"] = result["log_variance"]
    return out


def trajectories(models: ModuleType, diffusion: ModuleType) -> Goldens:
    """The kept states of every recorded run, the noisiest step first."""
    out: Goldens = {}
    for name, run in f.RUNS.items():
        size, dit = f.SIZES[run.size], network(models, run.size)
        process = diffusion_of(diffusion, f.RUN_STEPS, run.schedule, run.variance)
        x_T = f.latent("run.x_T", size, len(f.RUN_Y))
        labels = torch.tensor(f.RUN_Y)
        call: Any = dit
        kwargs: dict[str, Any] = {"y": labels}
        draw = f.recorded_noise(name)
        if run.cfg_scale != 1.0:
            # The original carries the null branch as a second half of the batch, noise included.
            x_T = torch.cat([x_T, x_T])
            null = torch.full_like(labels, size.null)
            call = dit.forward_with_cfg
            kwargs = {"y": torch.cat([labels, null]), "cfg_scale": run.cfg_scale}
            half = f.recorded_noise(name)

            def draw(step: int, shape: tuple[int, ...], half: Any = half) -> Any:
                return half(step, (shape[0] // 2, *shape[1:])).repeat(2, 1, 1, 1)

        options: dict[str, Any] = {
            "noise": x_T,
            "clip_denoised": run.clamp,
            "model_kwargs": kwargs,
            "device": "cpu",
        }
        if run.sampler == "ddim":
            steps = process.ddim_sample_loop_progressive(call, x_T.shape, eta=run.eta, **options)
        else:
            steps = process.p_sample_loop_progressive(call, x_T.shape, **options)
        with returned_noise(draw):
            states = [state["sample"][: len(labels)] for state in steps]
        out[f"run.{name}"] = torch.stack([states[kept] for kept in f.RUN_KEPT])
    return out


@contextmanager
def seen_masks(seen: list[Tensor]) -> Iterator[None]:
    """While open, every mask the authors enlarge is appended to `seen`, B h w."""
    interpolate = torch.nn.functional.interpolate

    def recording(mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(mask[:, 0].to(torch.uint8))
        return interpolate(mask, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "interpolate", recording):
        yield


def sag_process(sag: ModuleType, respace: ModuleType, steps: int, heads: int) -> Any:
    """The authors' process with an 8x8 attention grid and learned variance."""
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, [steps]),
        betas=sag.get_named_beta_schedule("linear", 1000),
        model_mean_type=sag.ModelMeanType.EPSILON,
        model_var_type=sag.ModelVarType.LEARNED_RANGE,
        loss_type=sag.LossType.MSE,
        sel_attn_block="output",
        sel_attn_depth=2,
        num_heads=heads,
    )


def degradations(sag: ModuleType, respace: ModuleType) -> Goldens:
    """Mask and degraded x_t of the authors' masking on fixed attention, x_0 and eps."""
    out: Goldens = {}
    for name, case in f.DEGRADE.items():
        process = sag_process(sag, respace, case.steps, case.heads)
        masks: list[Tensor] = []
        with seen_masks(masks):
            x_bar = process.attention_masking(
                case.x_0(name),
                torch.full((2,), case.index),
                case.attention(name),
                prev_noise=case.eps(name),
                blur_sigma=case.blur_sigma,
            )
        (mask,) = masks
        if not 0.2 < mask.float().mean() < 0.8:
            raise ValueError(f"degrade.{name}: {mask.float().mean():.0%} masked tells little")
        out[f"degrade.{name}.mask"] = mask
        out[f"degrade.{name}.x_bar"] = x_bar
    return out


def guided_steps(models: ModuleType, sag: ModuleType, respace: ModuleType) -> Goldens:
    """Mean, degraded x_t and mask of single guided steps of the pixel DiT."""
    out: Goldens = {}
    size = f.PIXEL
    for name, case in f.GUIDED.items():
        dit = network(models, "pixel")
        attention = dit.blocks[case.layer].attn
        attention.fused_attn = False  # the written-out softmax passes through attn_drop
        inputs: list[Tensor] = []
        maps: list[Tensor] = []
        dit.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        attention.attn_drop.register_forward_hook(lambda *args, maps=maps: maps.append(args[-1]))

        def call(x: Tensor, t: Tensor, y: Tensor, dit: Any = dit, maps: Any = maps) -> Any:
            return dit(x, t, y), maps[-1].flatten(0, 1)

        process = sag_process(sag, respace, case.steps, size.num_heads)
        for index in f.indices(case.steps):
            masks: list[Tensor] = []
            inputs.clear()
            maps.clear()
            with returned_noise(lambda step, shape: torch.zeros(shape)), seen_masks(masks):
                step = process.p_sample(
                    call,
                    f.latent(f"guided.{name}.x.{index}", size, len(case.labels)),
                    torch.full((len(case.labels),), index),
                    clip_denoised=case.clamp,
                    model_kwargs={"y": torch.tensor(case.labels)},
                    guidance_kwargs={
                        # The authors count from the degraded branch, the paper's s from the clean.
                        "guide_scale": 1.0 + case.scale,
                        "guide_start": case.steps,
                        "blur_sigma": case.blur_sigma,
                    },
                )
            key = f"guided.{name}.{index}"
            # Near the threshold, rounding alone would decide the mask.
            if (maps[0].mean(1).sum(1) - 1.0).abs().min() < 1e-4:
                raise ValueError(f"{key}: a saliency is too near 1, choose other inputs")
            out[f"{key}.mask"] = masks[0]
            out[f"{key}.x_bar"] = inputs[1]
            out[f"{key}.mean"] = step["sample"]
    return out


def main() -> None:
    """Make every golden and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dit", type=Path, help="checkout of facebookresearch/DiT")
    parser.add_argument("sag", type=Path, help="checkout of SusungHong/Self-Attention-Guidance")
    parser.add_argument("--out", type=Path, default=f.GOLDENS)
    args = parser.parse_args()
    sys.path[:0] = [str(args.dit), str(args.sag)]

    import diffusion  # type: ignore[import-not-found]
    import models  # type: ignore[import-not-found]
    from guided_diffusion import (  # type: ignore[import-not-found]
        gaussian_diffusion as sag,
    )
    from guided_diffusion import respace

    with torch.no_grad():
        goldens = {
            **forwards(models),
            **schedules(diffusion),
            **posteriors(models, diffusion),
            **trajectories(models, diffusion),
            **degradations(sag, respace),
            **guided_steps(models, sag, respace),
        }
    for key, value in goldens.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite")
    save_file({key: value.contiguous() for key, value in goldens.items()}, args.out)
    size = args.out.stat().st_size
    print(f"{len(goldens)} tensors, {size / 1024:.0f} KiB, in {args.out}")


if __name__ == "__main__":
    main()
