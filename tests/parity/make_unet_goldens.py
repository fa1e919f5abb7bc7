"""Runs guided diffusion, improved diffusion, SAG's fork and SiT on fixed weights, and stores it.

Needs checkouts of openai/guided-diffusion, openai/improved-diffusion,
SusungHong/Self-Attention-Guidance and willisma/SiT, and torchdiffeq, which this project neither
contains nor imports anywhere else. From the root of the repository, on a CPU, with the four paths:

    python -m tests.parity.make_unet_goldens GUIDED IMPROVED SAG SIT

It writes `unet_goldens.safetensors` and `unet_layouts.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import unet_fixed as f
from .make_goldens import returned_noise, seen_masks

Goldens = dict[str, Tensor]
Layouts = dict[str, dict[str, list[int]]]


def imported(root: Path, package: str, *modules: str) -> SimpleNamespace:
    """Import modules of a checkout; another checkout's package of that name is forgotten."""
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        prefix = f"{package}." if modules != (package,) else ""
        return SimpleNamespace(**{m: import_module(prefix + m) for m in modules})
    finally:
        sys.path.remove(str(root))


def filled(network: nn.Module, name: str, layouts: Layouts) -> Any:
    """Give a network its fixed weights, and note their names and shapes."""
    state = {key: f.values(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    layouts[name] = {key: list(value.shape) for key, value in state.items()}
    network.load_state_dict(state)
    return network.eval()


def process_of(code: Any, net: f.Net, steps: int, ddim: bool = False, **options: Any) -> Any:
    """The original's respaced process of a network."""
    gd = code.gaussian_diffusion
    count = net.process["num_timesteps"]
    learned = net.flags["out_channels"] == 6
    return code.respace.SpacedDiffusion(
        use_timesteps=code.respace.space_timesteps(count, f"ddim{steps}" if ddim else [steps]),
        betas=gd.get_named_beta_schedule(net.process["schedule"], count),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learned else gd.ModelVarType.FIXED_LARGE,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=count == 4000,
        **options,
    )


def labels_of(net: f.Net) -> dict[str, Tensor]:
    """The labels of two rows, if the network takes any."""
    return {"y": torch.tensor(f.LABELS)} if net.classes else {}


def openai(codes: dict[str, Any], layouts: Layouts) -> Goldens:
    """Outputs, single steps and trajectories of guided and improved diffusion."""
    out: Goldens = {}
    nets = {
        name: filled(codes[net.code].unet.UNetModel(**net.flags), name, layouts)
        for name, net in f.NETS.items()
    }
    for name, net in f.NETS.items():
        scale = 1000 / net.process["num_timesteps"]
        x, t = f.image(f"forward.{name}", net, 2), torch.tensor(f.FORWARD_T) * scale
        out[f"forward.{name}"] = f.thin(nets[name](x, t, **labels_of(net)))
    for name, (steps, indices) in f.STEPS.items():
        net = f.NETS[name]
        process = process_of(codes[net.code], net, steps)
        for index in indices:
            x, t = f.image(f"step.{name}.{index}", net, 2), torch.full((2,), index)
            done = process.p_mean_variance(nets[name], x, t, model_kwargs=labels_of(net))
            out[f"step.{name}.{index}.mean"] = f.thin(done["mean"])
            out[f"step.{name}.{index}.log_variance"] = f.thin(done["log_variance"])
    for run, name in f.RUNS.items():
        net = f.NETS[name]
        process = process_of(codes[net.code], net, f.RUN_STEPS, ddim=run == "ddim")
        loop = "ddim_sample_loop_progressive" if run == "ddim" else "p_sample_loop_progressive"
        x = f.image(f"run.{run}", net, 2)
        with returned_noise(lambda step, shape, run=run: f.fixed(f"noise.{run}.{step}", *shape)):
            states = [
                state["sample"]
                for state in getattr(process, loop)(
                    nets[name], x.shape, noise=x, model_kwargs=labels_of(net), device="cpu"
                )
            ]
        out[f"run.{run}"] = f.thin(torch.stack([states[kept] for kept in f.KEPT]))
    classifier = filled(
        codes["guided"].unet.EncoderUNetModel(**f.CLASSIFIER.flags), "classifier", layouts
    )
    x = f.image("classifier", f.CLASSIFIER, 2)
    out["classifier.logits"] = classifier(x, torch.tensor(f.FORWARD_T))
    return out | classified(codes["guided"], nets["adm"], classifier)


def classified(code: Any, network: Any, classifier: Any) -> Goldens:
    """Single steps under classifier guidance: the mean of one form, the eps of the other."""
    out: Goldens = {}
    net = f.NETS["adm"]
    process = process_of(code, net, 250)

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = classifier(x, t).log_softmax(-1)[range(len(y)), y]
            return f.CLASSIFIER_SCALE * torch.autograd.grad(chosen.sum(), x)[0]

    for index in f.CLASSIFIED:
        x, t = f.image(f"classified.{index}", net, 2), torch.full((2,), index)
        labels = labels_of(net)
        for prefix, clamp in (("", False), ("clamped.", True)):
            plain = process.p_mean_variance(network, x, t, clip_denoised=clamp, model_kwargs=labels)
            mean = process.condition_mean(gradient, plain, x, t, model_kwargs=labels)
            scored = process.condition_score(gradient, plain, x, t, model_kwargs=labels)
            eps = process._predict_eps_from_xstart(x, t, scored["pred_xstart"])
            out[f"classifier.{index}.{prefix}mean"] = f.thin(mean)
            out[f"classifier.{index}.{prefix}eps"] = f.thin(eps)
    return out


def guided(fork: Any) -> Goldens:
    """Scores, mask, degraded x_t, guided eps and mean of single steps of the authors' fork."""
    out: Goldens = {}
    for name, case in f.GUIDED.items():
        net = f.NETS[case.net]
        block, depth = case.layer.replace("_blocks", "").replace("_block", ".0").split(".")
        # Their map is rebuilt with num_heads, whatever the layer has.
        heads = case.heads or 64 // net.stated["num_head_channels"]
        where = {"sel_attn_block": block, "sel_attn_depth": int(depth)}
        network = filled(fork.unet.UNetModel(**net.flags, **where, num_heads=heads), name, {})
        process = process_of(fork, net, f.GUIDED_STEPS, **where, num_heads=heads)
        inputs: list[Tensor] = []
        maps: list[Tensor] = []
        masks: list[Tensor] = []
        eps: list[Tensor] = []
        network.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        network.register_forward_hook(lambda *args, maps=maps: maps.append(args[-1][1]))
        predict, degrade = process._predict_xstart_from_eps, process.attention_masking

        def recording(
            x_t: Tensor, t: Tensor, eps: Tensor, predict: Any = predict, seen: Any = eps
        ) -> Any:
            seen.append(eps)
            return predict(x_t, t, eps)

        def masking(*args: Any, degrade: Any = degrade, masks: Any = masks, **kwargs: Any) -> Any:
            # Here alone, for the network itself enlarges too.
            with seen_masks(masks):
                return degrade(*args, **kwargs)

        with (
            returned_noise(lambda step, shape: torch.zeros(shape)),
            mock.patch.object(process, "attention_masking", masking),
            mock.patch.object(process, "_predict_xstart_from_eps", recording),
        ):
            done = process.p_sample(
                network,
                f.image(f"guided.{name}", net, 2),
                torch.full((2,), case.index),
                model_kwargs=labels_of(net),
                guidance_kwargs={
                    # The authors count from the degraded branch, the paper's s from the clean.
                    "guide_scale": 1.0 + case.scale,
                    "guide_start": f.GUIDED_STEPS,
                    "blur_sigma": case.blur_sigma,
                },
            )
        scores = maps[0].unflatten(0, (2, heads)).mean(1).sum(1)
        # Near the threshold, rounding alone would decide the mask.
        if (scores - 1.0).abs().min() < 1e-4 or not 0.2 < masks[0].float().mean() < 0.8:
            raise ValueError(f"guided.{name}: choose other inputs")
        key = f"guided.{name}"
        out[f"{key}.scores"] = scores
        out[f"{key}.mask"] = masks[0]
        out[f"{key}.x_bar"] = f.thin(inputs[1])
        out[f"{key}.eps"] = f.thin(eps[-1])
        out[f"{key}.mean"] = f.thin(done["sample"])
    return out


def sit(code: Any, layouts: Layouts) -> Goldens:
    """Outputs, velocities and scores at single times, and trajectories of SiT's own samplers."""
    out: Goldens = {}
    network = filled(code.models.SiT(**f.SIT_SIZE), "sit", layouts)
    count = len(f.SIT_T)
    x = f.fixed("sit.x", count, 4, 8, 8)
    t, y = torch.tensor(f.SIT_T), torch.tensor(f.SIT_LABELS)
    for prediction in f.PREDICTIONS:
        sampler = code.transport.Sampler(code.transport.create_transport("Linear", prediction))
        out[f"sit.{prediction}.drift"] = sampler.drift(x, t, network, y=y)
        out[f"sit.{prediction}.score"] = sampler.score(x, t, network, y=y)
    sampler = code.transport.Sampler(code.transport.create_transport("Linear", "velocity"))
    noise, labels = f.fixed("sit.x_T", 2, 4, 8, 8), torch.tensor(f.SIT_LABELS[:2])
    ode = sampler.sample_ode(sampling_method="euler", num_steps=f.SIT_STEPS + 1)
    out["sit.ode"] = f.thin(ode(noise, network, y=labels)[1:])
    both = torch.cat([labels, torch.full((2,), 10)])
    ode = sampler.sample_ode(sampling_method="euler", num_steps=f.SIT_STEPS + 1)
    states = ode(torch.cat([noise, noise]), network.forward_with_cfg, y=both, cfg_scale=f.SIT_CFG)
    out["sit.ode_cfg"] = f.thin(states[1:, :2])
    for theirs, ours in f.FORMS.items():
        steps = iter(range(100))

        def randn(shape: Any, form: str = ours, steps: Any = steps) -> Tensor:
            return f.sit_noise(form, next(steps), tuple(shape))

        # A tensor, for without one the constant form fails there.
        sde = sampler.sample_sde(
            diffusion_form=theirs, diffusion_norm=torch.tensor(1.0), num_steps=f.SIT_STEPS
        )
        with mock.patch.object(torch, "randn", randn):
            out[f"sit.sde.{ours}"] = f.thin(torch.stack(sde(noise, network, y=labels)))
    return out


def main() -> None:
    """Make every golden and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("guided", "improved", "sag", "sit"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    parts = ("unet", "gaussian_diffusion", "respace")
    layouts: Layouts = {}
    with torch.no_grad():
        codes = {
            "guided": imported(args.guided, "guided_diffusion", *parts),
            "improved": imported(args.improved, "improved_diffusion", *parts),
        }
        goldens = openai(codes, layouts)
        goldens |= guided(imported(args.sag, "guided_diffusion", *parts))
        models = imported(args.sit, "models", "models")
        transport = imported(args.sit, "transport", "transport")
        goldens |= sit(SimpleNamespace(**vars(models), **vars(transport)), layouts)
    for key, value in goldens.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite")
    save_file({key: value.contiguous() for key, value in goldens.items()}, f.GOLDENS)
    f.LAYOUTS.write_text(json.dumps(layouts, separators=(",", ":")) + "\n")
    for file in (f.GOLDENS, f.LAYOUTS):
        print(f"{file.stat().st_size / 1024:.0f} KiB, in {file}")


if __name__ == "__main__":
    main()
