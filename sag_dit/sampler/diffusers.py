"""diffusers' schedulers as samplers: those that were proven right, by short names.

The proof is tests/sampler/test_diffusers.py; a scheduler that is not in it is refused by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, cast

import numpy as np

from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, NoiseLevel, Process, Step
from sag_dit.process.ddpm import CLEAN
from sag_dit.sampler.base import Denoise, Sampler, SampleStep, require_ddpm
from sag_dit.tensors import Images


@dataclass(frozen=True)
class SchedulerRecipe:
    """How one scheduler is built and driven, and where it is proven.

    ``scaled``: the scheduler keeps x_0 + s eps, which ``scale_model_input`` turns into x_t.
    ``output``: the kind of prediction it is given. v keeps its digits where alpha is small.
    ``least``: the fewest steps with which it does not overshoot. ``schedules``: the betas on which
    it is proven. ``renoises``: a step uses one prediction, see :attr:`Sampler.renoises`.

    Example:
        >>> PROVEN["heun"].least
        5
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = False
    stochastic: bool = False
    output: Literal["v_prediction", "epsilon"] = "v_prediction"
    spacing: Literal["linspace", "trailing"] | None = "linspace"
    least: int = 1
    schedules: tuple[str, ...] = ("linear", "scaled_linear", "cosine")
    renoises: bool = False


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# The cosine schedule starts at a noise-to-signal ratio of 20,000 (the linear one at 157), where
# these schedulers overshoot or lose their last digit in single precision.
LINEAR = ("linear", "scaled_linear")

PROVEN: Mapping[str, SchedulerRecipe] = {
    "dpmpp_2m": SchedulerRecipe("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": SchedulerRecipe("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": SchedulerRecipe("DPMSolverMultistepScheduler", SDE, stochastic=True),
    "dpmpp_2m_sde_karras": SchedulerRecipe(
        "DPMSolverMultistepScheduler", SDE | KARRAS, stochastic=True
    ),
    "dpmpp_3m": SchedulerRecipe("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2s": SchedulerRecipe(
        "DPMSolverSinglestepScheduler", {"lower_order_final": True}, spacing=None
    ),
    "unipc": SchedulerRecipe("UniPCMultistepScheduler"),
    "unipc_karras": SchedulerRecipe("UniPCMultistepScheduler", KARRAS),
    "euler": SchedulerRecipe("EulerDiscreteScheduler", scaled=True, renoises=True),
    "euler_karras": SchedulerRecipe("EulerDiscreteScheduler", KARRAS, scaled=True, renoises=True),
    "euler_ancestral": SchedulerRecipe(
        "EulerAncestralDiscreteScheduler",
        scaled=True,
        stochastic=True,
        least=3,
        schedules=LINEAR,
        renoises=True,
    ),
    "heun": SchedulerRecipe("HeunDiscreteScheduler", scaled=True, least=5, schedules=LINEAR),
    "heun_karras": SchedulerRecipe(
        "HeunDiscreteScheduler", KARRAS, scaled=True, least=8, schedules=LINEAR
    ),
    "kdpm2": SchedulerRecipe("KDPM2DiscreteScheduler", scaled=True, least=5),
    "kdpm2_ancestral": SchedulerRecipe(
        "KDPM2AncestralDiscreteScheduler", scaled=True, stochastic=True, least=10, schedules=LINEAR
    ),
    "lms": SchedulerRecipe("LMSDiscreteScheduler", scaled=True),
    # Its history is of eps, and its stride is whole, which only trailing spacing meets.
    "pndm": SchedulerRecipe(
        "PNDMScheduler",
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        output="epsilon",
        spacing="trailing",
        least=4,
        schedules=LINEAR,
    ),
}

OWN = "this package has its own, "
NOT_CLEAN = "it stops at the noise of t = 0 and returns an image that is not clean"
DISTILLED = "it is for distilled models"
OTHER_MODEL = "it is for models of another process"
REFUSED: Mapping[str, str] = {
    "ddim": f"{OWN}sampler=ddim",
    "ddim_parallel": f"{OWN}sampler=ddim",
    "ddpm": f"{OWN}sampler=ddpm",
    "ddpm_parallel": f"{OWN}sampler=ddpm",
    "deis_multistep": NOT_CLEAN,
    "sa_solver": NOT_CLEAN,
    "ipndm": "it takes betas for noise levels of its own and ignores the model's",
    "dpm_solver_sde": "it draws from a Brownian tree of its own, not from the images' noise",
    "lcm": DISTILLED,
    "tcd": DISTILLED,
    "edm_euler": OTHER_MODEL,
    "edm_dpm_solver_multistep": OTHER_MODEL,
    "cosine_dpm_solver_multistep": OTHER_MODEL,
    "flow_match_euler_discrete": f"{OWN}sampler=euler_flow",
    "flow_match_heun_discrete": f"{OWN}sampler=heun_flow",
}


def _bare(name: str) -> str:
    """Return a name without what its spellings differ in: case, separators, the word scheduler."""
    return "".join(c for c in name.lower() if c.isalnum()).removesuffix("scheduler")


def _refusal(name: str) -> str:
    """Say why a name is refused, and what to ask for instead."""
    proven = f"proven are {', '.join(PROVEN)}"
    same = [short for short, recipe in PROVEN.items() if recipe.scheduler == name]
    if same:
        return f"sampler {name!r}: expected a short name, here {' or '.join(same)}; {proven}"
    for refused, reason in REFUSED.items():
        if _bare(name) in (_bare(refused), _bare(refused).removesuffix("multistep")):
            return f"sampler {name!r} is not offered: {reason}; {proven}"
    spellings = {_bare(short): short for short in PROVEN}
    for short, recipe in PROVEN.items():
        spellings.setdefault(_bare(recipe.scheduler), short)
    near = get_close_matches(_bare(name), spellings, n=1)
    hint = f"did you mean {spellings[near[0]]}? " if near else ""
    return f"sampler {name!r} is unknown or not proven; {hint}{proven}"


@dataclass(frozen=True)
class DiffusersSampler(Sampler):
    """One of diffusers' schedulers, by its short name, on the process's own betas.

    The network is asked at the scheduler's own level: with s its ratio of noise to signal, alpha =
    1 / sqrt(1 + s^2) and sigma = s alpha. t may lie between whole times. Each evaluation of the
    network is one step. So schedulers that evaluate twice yield more steps than were asked for, and
    such a step may end at the level where it began or, in kdpm2_ancestral, at a noisier one.
    ``SampleStep.x`` is always x_t = alpha x_0 + sigma eps at the level of ``step.next``.

    Source: diffusers; Lu et al. 2022 (dpmpp), Zhao et al. 2023 (unipc), Karras et al. 2022
    (karras, euler, heun, kdpm2), Liu et al. 2022 (pndm).

    Raises:
        ValueError: the name is not that of a proven scheduler.

    Example::

        sag_dit.sample(model, [3, 7], sampler=DiffusersSampler("dpmpp_2m"), steps=25)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in PROVEN:
            raise ValueError(_refusal(str(self.name)))

    @property
    def renoises(self) -> bool:  # type: ignore[override]
        """Whether the scheduler takes each step from one prediction."""
        return PROVEN[self.name].renoises

    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield one step per evaluation of the network; see :meth:`Sampler.steps`."""
        # A fresh scheduler, and the level at which each evaluation stands.
        recipe = PROVEN[self.name]
        self.check(process, num_steps)
        ddpm = cast(DDPM, process)
        scheduler = _scheduler(recipe, ddpm, num_steps)
        levels = levels_of(scheduler)
        self._check_grid(levels, ddpm, num_steps)
        # Ask the network at each level.
        count = len(levels) - 1
        state = x * float(scheduler.init_noise_sigma)
        for index, t in enumerate(scheduler.timesteps):
            step = Step(index, count, levels[index], levels[index + 1], scheduler.order)
            prediction = denoise(scheduler.scale_model_input(state, t), step)
            # The scheduler takes the step, with the images' own noise where it draws any.
            clamped = prediction.clamped(x_0_range)
            output = clamped.eps if recipe.output == "epsilon" else clamped.v
            if clamped.x_t is not prediction.x_t:
                # The step starts where x_0 and another prediction's noise lead, without scaling.
                state = clamped.x_t / float(step.level.alpha)
            draw = {"generator": noise.torch_generators(index)} if recipe.stochastic else {}
            state = scheduler.step(output, t, state, return_dict=False, **draw)[0]
            yield SampleStep(step, state * step.next.alpha if recipe.scaled else state, prediction)

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process, or a number of steps on it, that this scheduler is not proven on.

        Raises:
            ValueError: it is not proven; the message says what to use instead.
        """
        recipe = PROVEN[self.name]
        require_ddpm(process, self.name)
        process.check_steps(num_steps)
        ddpm = cast(DDPM, process)
        if ddpm.schedule not in recipe.schedules:
            raise ValueError(
                f"sampler={self.name}: not proven on the {ddpm.schedule} schedule of this model, "
                f"where it overshoots; use sampler=dpmpp_2m, dpmpp_2m_sde, unipc, kdpm2 or lms"
            )
        if num_steps < recipe.least:
            raise ValueError(
                f"steps={num_steps}: {self.name} overshoots in so few; expected {recipe.least} or "
                f"more, or another sampler"
            )
        total = ddpm.num_timesteps
        if self.name == "pndm" and total % num_steps:
            fitting = [n for n in range(recipe.least, total + 1) if total % n == 0]
            below = [str(n) for n in fitting if n < num_steps]
            above = [str(n) for n in fitting if n > num_steps]
            raise ValueError(
                f"steps={num_steps}: pndm takes strides of whole times, expected a divisor of "
                f"{total}; nearest are {' and '.join((*below[-1:], *above[:1]))}"
            )

    def _check_grid(self, levels: tuple[NoiseLevel, ...], process: DDPM, num_steps: int) -> None:
        """Refuse a grid that does not start at the noisiest level or takes too few levels."""
        noisiest = float(process.level(process.num_timesteps - 1).alpha)
        starts_there = math.isclose(float(levels[0].alpha), noisiest, rel_tol=1e-3)
        if not starts_there or len({level.sigma for level in levels}) <= num_steps:
            raise ValueError(
                f"steps={num_steps}: the grid that diffusers makes for {self.name} skips the "
                f"noisiest level or repeats one; use {num_steps - 1} steps or another sampler"
            )


def _scheduler(recipe: SchedulerRecipe, process: DDPM, num_steps: int) -> Any:
    """Build a fresh scheduler, since most keep a history."""
    import diffusers

    spacing = recipe.spacing
    # With these two numbers of steps linspace starts at t = 0 or repeats a time, and trailing does
    # not. With others (61, 103, ...) trailing makes one step too many.
    if spacing == "linspace" and num_steps in (1, process.num_timesteps):
        spacing = "trailing"
    with warnings.catch_warnings():
        # diffusers hands tensors to NumPy in ways that NumPy 2 warns about.
        warnings.filterwarnings("ignore", "__array_", DeprecationWarning)
        scheduler = getattr(diffusers, recipe.scheduler)(
            num_train_timesteps=process.num_timesteps,
            trained_betas=process.betas,
            prediction_type=recipe.output,
            **({} if spacing is None else {"timestep_spacing": spacing}),
            **recipe.options,
        )
        scheduler.set_timesteps(num_steps)
    # Otherwise the scheduler finds its first step by the time, which may occur twice.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def levels_of(scheduler: Any) -> tuple[NoiseLevel, ...]:
    """Return the level of every evaluation, and the clean one.

    The state after one evaluation is what the next one is asked about, so no other levels occur.
    """
    # The ratio of noise to signal at the trained times, and at each evaluation.
    times = scheduler.timesteps.cpu().double().numpy()
    count = len(times)
    squared = scheduler.alphas_cumprod.cpu().double().numpy()
    table = np.sqrt((1 - squared) / squared)
    if hasattr(scheduler, "sigmas"):
        ratios = scheduler.sigmas[:count].cpu().double().numpy()
        if hasattr(scheduler, "sigmas_interpol"):
            between = scheduler.sigmas_interpol.cpu().double().numpy()
            # Ancestral sampling looks between a level and the lower one it will add noise to.
            shift = 1 if hasattr(scheduler, "sigmas_up") else 0
            ratios[1::2] = between[1 - shift : count - shift : 2]
    else:
        ratios = table[scheduler.timesteps.cpu().numpy()]
    if scheduler.config.get("use_karras_sigmas"):
        # diffusers rounds most of these times, which then belong to another level than x_t's.
        times = np.interp(np.log(ratios), np.log(table), np.arange(len(table)))
    alphas = 1 / np.sqrt(1 + ratios**2)
    return (
        *(
            NoiseLevel(t=t, alpha=alpha, sigma=s * alpha, d_alpha=-s * alpha, d_sigma=alpha)
            for t, s, alpha in zip(times.tolist(), ratios.tolist(), alphas.tolist(), strict=True)
        ),
        CLEAN,
    )
