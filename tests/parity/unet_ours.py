"""What this project computes for every golden of `unet_goldens.safetensors`, under its own key."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from sag_dit.attention import Capture
from sag_dit.checkpoints import config, formats, loading
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, ClassifierGuidance, GuidedDenoiser
from sag_dit.models import DiT
from sag_dit.models.dit import sit
from sag_dit.models.unet.adapter import convert
from sag_dit.models.unet.classifier import Classifier
from sag_dit.process import DDPM, Flow, Step
from sag_dit.process.ddpm import Posterior
from sag_dit.sampler import Ancestral, EulerFlow, EulerMaruyama, Sampler, StridedDDIM
from tests.parity import ours
from tests.parity import unet_fixed as f

Outputs = dict[str, Tensor]

# The authors' code keeps the last of what it predicts; SiT's guides three channels.
CFG_CHANNELS = 3


@lru_cache
def denoiser(name: str) -> ClassConditional:
    """Our network of published weights, as loading builds it."""
    net, path = f.NETS[name], Path(f"{name}.pt")
    converted = convert(f.state_of(name), path, net.beside)
    checkpoint = formats.Checkpoint(
        converted.state, (path,), {"model": converted.model, "process": net.process}
    )
    with torch.device("meta"):
        model = config.build(loading.full_config(checkpoint))
    loading.fill(model.network, converted.state, path)
    return model.eval()


def labels_of(name: str) -> Tensor:
    """The labels of two rows; a network without classes is asked for its only one."""
    return torch.tensor(f.LABELS if f.NETS[name].classes else (0, 0))


def forwards() -> Outputs:
    """The networks' outputs."""
    out: Outputs = {}
    for name, net in f.NETS.items():
        model = denoiser(name)
        x = f.image(f"forward.{name}", net, 2)
        # The original is told times of 1,000 steps, ours of its own.
        t = torch.tensor(f.FORWARD_T)
        out[f"forward.{name}"] = f.thin(model.evaluate(x, t, labels_of(name)))
    return out


def steps() -> Outputs:
    """Mean and log-variance of single ancestral steps."""
    out: Outputs = {}
    for name, (count, indices) in f.STEPS.items():
        model, sampler = denoiser(name), Ancestral()
        posterior = Posterior.of(model.process.grid(count))
        for index in indices:
            x = f.image(f"step.{name}.{index}", f.NETS[name], 2)
            step = ours.step_at(model.process, count, index)  # type: ignore[arg-type]
            guided = GuidedDenoiser(model)
            mean, prediction = ours.one_step(sampler, guided, x, labels_of(name), step)
            log_variance = sampler.log_variance(posterior, step.index, prediction)
            out[f"step.{name}.{index}.mean"] = f.thin(mean)
            out[f"step.{name}.{index}.log_variance"] = f.thin(log_variance.expand_as(mean))
    return out


def trajectories() -> Outputs:
    """The kept states of the recorded runs."""
    out: Outputs = {}
    for run, name in f.RUNS.items():
        model = denoiser(name)
        sampler: Sampler = StridedDDIM() if run == "ddim" else Ancestral()
        noise = ours.RecordedNoise(lambda i, shape, run=run: f.fixed(f"noise.{run}.{i}", *shape))
        states = states_of(
            sampler, model, f.image(f"run.{run}", f.NETS[name], 2), labels_of(name), noise
        )
        out[f"run.{run}"] = f.thin(torch.stack([states[kept] for kept in f.KEPT]))
    return out


def states_of(
    sampler: Sampler,
    model: ClassConditional,
    x: Tensor,
    labels: Tensor,
    noise: ours.RecordedNoise,
    steps: int = f.RUN_STEPS,
    cfg_scale: float = 1.0,
) -> list[Tensor]:
    """Every state of a run."""
    guided = GuidedDenoiser(model, [CFG(cfg_scale, channels=CFG_CHANNELS)])

    def denoise(x_t: Tensor, step: Step) -> object:
        return guided(x_t, step, labels)

    done = sampler.steps(
        denoise,  # type: ignore[arg-type]
        x,
        model.process,
        steps,
        noise,
        model.x_0_range,
    )
    return [step.x for step in done]


def classifier() -> Outputs:
    """The classifier's logits, and single steps that it guides."""
    net, path = f.CLASSIFIER, Path("classifier.pt")
    converted = convert(f.state_of("classifier"), path, net.beside, classifier=True)
    with torch.device("meta"):
        network = Classifier(**converted.model).eval()
    loading.fill(network, converted.state, path)
    x = f.image("classifier", net, 2)
    out = {"classifier.logits": network(x, torch.tensor(f.FORWARD_T))}
    clamping = denoiser("adm")
    free = ClassConditional(clamping.network, clamping.process)
    for (prefix, model), index in product({"": free, "clamped.": clamping}.items(), f.CLASSIFIED):
        step = ours.step_at(model.process, 250, index)  # type: ignore[arg-type]
        x, y = f.image(f"classified.{index}", f.NETS["adm"], 2), labels_of("adm")
        for form, key in (("mean", "mean"), ("score", "eps")):
            term = ClassifierGuidance(f.CLASSIFIER_SCALE, classifier=network, form=form)  # type: ignore[arg-type]
            mean, prediction = ours.one_step(Ancestral(), GuidedDenoiser(model, [term]), x, y, step)
            eps = prediction.clamped(model.x_0_range).eps
            out[f"classifier.{index}.{prefix}{key}"] = f.thin(mean if form == "mean" else eps)
    return out


def guided_steps() -> Outputs:
    """Single guided ancestral steps, from the attention scores to the mean."""
    out: Outputs = {}
    for name, case in f.GUIDED.items():
        model = denoiser(case.net)
        assert isinstance(model.process, DDPM)
        term = SAG(
            case.scale,
            layer=case.layer,
            blur_sigma=case.blur_sigma,
            kernel_size=31,
            heads=case.heads,
        )
        step = ours.step_at(model.process, f.GUIDED_STEPS, case.index)
        x, y = f.image(f"guided.{name}", f.NETS[case.net], 2), labels_of(case.net)
        inputs: list[Tensor] = []

        def seen(_: nn.Module, args: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
            inputs.append(args[0])

        hook = model.network.register_forward_pre_hook(seen)
        with ours.seen_masks() as masks:
            guided = GuidedDenoiser(model, [term])
            mean, prediction = ours.one_step(Ancestral(), guided, x, y, step)
        hook.remove()
        wish = Capture(model.layer(case.layer), heads=case.heads)
        read = model(x, step.level, y, [wish])
        key = f"guided.{name}"
        out[f"{key}.scores"] = read.attention[wish.key]
        out[f"{key}.mask"] = masks[0]
        out[f"{key}.x_bar"] = f.thin(inputs[1])
        out[f"{key}.eps"] = f.thin(prediction.eps)
        out[f"{key}.mean"] = f.thin(mean)
    return out


def sit_denoiser(prediction: str) -> ClassConditional:
    """Our DiT of SiT's weights."""
    state, said = sit.from_sit(f.state_of("sit"), sit.SiTVariant(prediction, repa=False))
    with torch.device("meta"):
        network = DiT(**{**f.SIT_SIZE, "learn_sigma": False})  # type: ignore[arg-type]
    network.load_state_dict(state, assign=True)
    return ClassConditional(network, Flow(**said["process"]), said["kind"]).eval()


def flows() -> Outputs:
    """SiT's velocity, which is the negative of ours, its score, and its samplers' states."""
    out: Outputs = {}
    x, y = f.fixed("sit.x", len(f.SIT_T), 4, 8, 8), torch.tensor(f.SIT_LABELS)
    for prediction in f.PREDICTIONS:
        model = sit_denoiser(prediction)
        level = model.process.level(1 - torch.tensor(f.SIT_T))
        said = model(x, level, y)
        out[f"sit.{prediction}.drift"] = -said.v
        out[f"sit.{prediction}.score"] = -said.eps / level.sigma
    model = sit_denoiser("velocity")
    noise, labels = f.fixed("sit.x_T", 2, 4, 8, 8), y[:2]
    common = (model, noise, labels)
    for key, scale in (("ode", 1.0), ("ode_cfg", f.SIT_CFG)):
        states = states_of(EulerFlow(), *common, ours.NO_NOISE, f.SIT_STEPS, scale)
        out[f"sit.{key}"] = f.thin(torch.stack(states))
    for form in f.FORMS.values():
        draw = ours.RecordedNoise(lambda i, shape, form=form: f.sit_noise(form, i, shape))
        solver = EulerMaruyama(diffusion=form)  # type: ignore[arg-type]
        states = states_of(solver, *common, draw, f.SIT_STEPS)
        out[f"sit.sde.{form}"] = f.thin(torch.stack(states))
    return out


GROUPS: dict[str, Callable[[], Outputs]] = {
    "forward": forwards,
    "step": steps,
    "run": trajectories,
    "classifier": classifier,
    "guided": guided_steps,
    "sit": flows,
}


def compute(group: str) -> Outputs:
    """Everything of one group, whose name starts its keys."""
    with torch.no_grad():
        return GROUPS[group]()
