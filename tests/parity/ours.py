"""What this project computes for every golden, under the golden's own key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from sag_dit.attention import capture_key, saliency
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, Branch, GuidedDenoiser, Question
from sag_dit.guidance import sag as sag_module
from sag_dit.models import DiT
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, NoiseLevel, Prediction, Step
from sag_dit.process.ddpm import Posterior
from sag_dit.sampler import DDIM, Ancestral, Sampler
from sag_dit.sampler import ddpm as ancestral_module
from tests.parity import fixed as f

Outputs = dict[str, Tensor]

# The published sampler guides the first three channels only.
CFG_CHANNELS = 3


class RecordedNoise(NoiseSource):
    """A noise source whose step `i` is `draw(i, shape)`."""

    def __init__(self, draw: Callable[[int, tuple[int, ...]], Tensor]) -> None:
        super().__init__(seeds=(), indices=())
        object.__setattr__(self, "draw", draw)

    def like(self, x: Tensor, step: int) -> Tensor:
        """Return the recorded noise of that step."""
        out: Tensor = self.draw(step, tuple(x.shape))  # type: ignore[attr-defined]
        return out


NO_NOISE = RecordedNoise(lambda step, shape: torch.zeros(shape))


def network(name: str) -> DiT:
    """Our DiT of one small size with the fixed weights."""
    size = f.SIZES[name]
    built = DiT(
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


def denoiser(name: str, schedule: str = "linear", clamp: bool = False) -> ClassConditional:
    """That DiT with its process; clamped to [-1, 1] like the original's `clip_denoised`."""
    process = DDPM(schedule=schedule)  # type: ignore[arg-type]
    return ClassConditional(network(name), process, x_0_range=(-1.0, 1.0) if clamp else None)


def step_at(process: DDPM, steps: int, index: int) -> Step:
    """The step that starts at the original's respaced `index`, which counts from the clean end."""
    grid, i = process.grid(steps), steps - 1 - index
    return Step(i, steps, grid[i], grid[i + 1])


def one_step(
    sampler: Sampler, guided: GuidedDenoiser, x: Tensor, cond: Tensor, step: Step
) -> tuple[Tensor, Prediction]:
    """Run the sampler at one step of its grid only, without noise: the mean of the next state."""

    def only(*_: object) -> Iterator[Step]:
        yield step

    model = guided.model
    with mock.patch.object(ancestral_module, "steps_of", only):
        (done,) = sampler.steps(
            lambda x_t, step: guided(x_t, step, cond),
            x,
            model.process,
            step.count,
            NO_NOISE,
            model.x_0_range,
        )
    return done.x, done.prediction


def forwards() -> Outputs:
    """Positions and forward passes."""
    out: Outputs = {}
    y = torch.tensor(f.FORWARD_Y)
    for name, size in f.SIZES.items():
        dit = network(name)
        x = f.latent("forward.x", size, len(y))
        out[f"forward.{name}.pos_embed"] = dit.pos_embed
        out[f"forward.{name}.whole_t"] = dit(x, torch.tensor(f.FORWARD_T).long(), y)
        out[f"forward.{name}.real_t"] = dit(x, torch.tensor(f.FORWARD_T_REAL), y)
    return out


def guided_forwards() -> Outputs:
    """Classifier-free guidance, written back as the network output that it amounts to."""
    out: Outputs = {}
    y = torch.tensor(f.CFG_Y)
    for name in ("learned", "plain"):
        model = denoiser(name)
        x = f.latent("cfg.x", f.SIZES[name], len(y))
        for scale in f.CFG_SCALES:
            guided = GuidedDenoiser(model, [CFG(scale, channels=CFG_CHANNELS)])
            for t in f.CFG_T:
                step = step_at(model.process, 1000, t)  # type: ignore[arg-type]
                prediction = guided(x, step, y)
                output = prediction.eps
                if prediction.variance_fraction is not None:
                    output = torch.cat([output, 2 * prediction.variance_fraction - 1], dim=1)
                out[f"cfg.{name}.{scale}.{t}"] = output
    return out


def schedules() -> Outputs:
    """Times, levels and fixed log-variances, in the original's order: the clean end first."""
    out: Outputs = {}
    for schedule in f.SCHEDULES:
        process = DDPM(schedule=schedule)  # type: ignore[arg-type]
        out[f"schedule.{schedule}.1000.betas"] = torch.from_numpy(process.betas)
        for steps in (1000, *f.STEP_COUNTS):
            key = f"schedule.{schedule}.{steps}"
            grid = process.grid(steps)
            levels = grid[-2::-1]
            out[f"{key}.timestep_map"] = torch.tensor([int(level.t) for level in levels])
            out[f"{key}.alphas_cumprod"] = (
                torch.tensor([level.alpha for level in levels], dtype=torch.float64) ** 2
            )
            if steps == 1000:
                continue
            posterior = Posterior.of(grid)
            for name, values in (
                ("fixed_small", posterior.log_lower),
                ("fixed_large", posterior.log_large),
            ):
                out[f"{key}.{name}"] = torch.tensor(values[::-1], dtype=torch.float64)
    return out


def posteriors() -> Outputs:
    """Ancestral mean and log-variance of single steps."""
    out: Outputs = {}
    cases = [("learned", s, n) for s in f.SCHEDULES for n in f.STEP_COUNTS]
    cases += [("fixed_small", "linear", f.RUN_STEPS), ("fixed_large", "linear", f.RUN_STEPS)]
    y = torch.tensor(f.POSTERIOR_Y)
    for variance, schedule, steps in cases:
        name = "learned" if variance == "learned" else "plain"
        sampler = Ancestral(variance=variance)  # type: ignore[arg-type]
        for clamp in (False, True):
            model = denoiser(name, schedule, clamp)
            posterior = Posterior.of(model.process.grid(steps))
            for index in f.indices(steps):
                key = f"posterior.{variance}.{schedule}.{steps}.{index}"
                x = f.latent(f"posterior.x.{index}", f.SIZES[name], len(y))
                step = step_at(model.process, steps, index)  # type: ignore[arg-type]
                mean, prediction = one_step(sampler, GuidedDenoiser(model), x, y, step)
                out[f"{key}.mean.{'clamped' if clamp else 'free'}"] = mean
                log_variance = sampler.log_variance(posterior, step.index, prediction)
                out[f"{key}.log_variance"] = log_variance.expand_as(mean)
    return out


def trajectories() -> Outputs:
    """The kept states of every recorded run."""
    out: Outputs = {}
    for name, run in f.RUNS.items():
        model = denoiser(run.size, run.schedule, run.clamp)
        guided = GuidedDenoiser(model, [CFG(run.cfg_scale, channels=CFG_CHANNELS)])
        ancestral = Ancestral(variance=run.variance)  # type: ignore[arg-type]
        sampler = DDIM(eta=run.eta) if run.sampler == "ddim" else ancestral

        def denoise(x_t: Tensor, step: Step, guided: GuidedDenoiser = guided) -> Prediction:
            return guided(x_t, step, torch.tensor(f.RUN_Y))

        done = sampler.steps(
            denoise,
            f.latent("run.x_T", f.SIZES[run.size], len(f.RUN_Y)),
            model.process,
            f.RUN_STEPS,
            RecordedNoise(f.recorded_noise(name)),
            model.x_0_range,
        )
        states = [step.x for step in done]
        out[f"run.{name}"] = torch.stack([states[kept] for kept in f.RUN_KEPT])
    return out


def degradations() -> Outputs:
    """SAG's mask and degraded x_t, asked of the term itself on fixed attention."""
    out: Outputs = {}
    model = denoiser("pixel")
    for name, case in f.DEGRADE.items():
        x_0, eps = case.x_0(name), case.eps(name)
        step = step_at(model.process, case.steps, case.index)  # type: ignore[arg-type]
        x_t, v = x_and_v(x_0, eps, step.level)
        attention = case.attention(name).unflatten(0, (2, case.heads))
        # Softmax of log-probabilities gives them back, so any map is some queries' and keys'.
        received = saliency(attention.log(), torch.eye(attention.shape[-1]), scale=1.0)

        term = SAG(scale=1.0, blur_sigma=case.blur_sigma, kernel_size=31, layer="blocks.1")
        talk = term.contribution(Question(step, Branch(model, x_t, cond=None), null=None))
        (asked,) = next(talk)
        attention_of = {capture_key(*capture): received for capture in asked.captures}
        with seen_masks() as masks:
            (degraded,) = talk.send((Prediction(x_t, step.level, v, attention=attention_of),))
        out[f"degrade.{name}.mask"] = masks[0]
        out[f"degrade.{name}.x_bar"] = degraded.x_t
    return out


def x_and_v(x_0: Tensor, eps: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The noisy image and velocity that x_0 and eps amount to at a level."""
    x_t = level.alpha * x_0 + level.sigma * eps
    return x_t, level.d_alpha * x_0 + level.d_sigma * eps


@contextmanager
def seen_masks() -> Iterator[list[Tensor]]:
    """Yield a list that receives every mask SAG makes while open."""
    masks: list[Tensor] = []
    make = sag_module.attention_mask

    def recording(*args: object, **kwargs: object) -> Tensor:
        masks.append(make(*args, **kwargs))  # type: ignore[arg-type]
        return masks[-1]

    with mock.patch.object(sag_module, "attention_mask", recording):
        yield masks


def guided_steps() -> Outputs:
    """Single ancestral steps of the pixel DiT under SAG, from the network to the mean."""
    out: Outputs = {}
    for name, case in f.GUIDED.items():
        model = denoiser("pixel", clamp=case.clamp)
        term = SAG(
            case.scale, blur_sigma=case.blur_sigma, kernel_size=31, layer=f"blocks.{case.layer}"
        )
        y = torch.tensor(case.labels)
        for index in f.indices(case.steps):
            step = step_at(model.process, case.steps, index)  # type: ignore[arg-type]
            x = f.latent(f"guided.{name}.x.{index}", f.PIXEL, len(y))
            inputs: list[Tensor] = []

            def seen(_: nn.Module, args: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
                inputs.append(args[0])

            hook = model.network.register_forward_pre_hook(seen)
            with seen_masks() as masks:
                mean, _ = one_step(Ancestral("learned"), GuidedDenoiser(model, [term]), x, y, step)
            hook.remove()
            key = f"guided.{name}.{index}"
            out[f"{key}.mask"] = masks[0]
            out[f"{key}.x_bar"] = inputs[1]
            out[f"{key}.mean"] = mean
    return out


GROUPS: dict[str, Callable[[], Outputs]] = {
    "forward": forwards,
    "cfg": guided_forwards,
    "schedule": schedules,
    "posterior": posteriors,
    "run": trajectories,
    "degrade": degradations,
    "guided": guided_steps,
}


def compute(group: str) -> Outputs:
    """Everything of one group, whose name starts its keys."""
    with torch.no_grad():
        return GROUPS[group]()
